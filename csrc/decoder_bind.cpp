// memlm_decoder_layers for Python, over addresses: memlm/layers/native.py keeps what they point to alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "include/memlm.h"

namespace py = pybind11;

namespace memlm {
namespace {

using Address = uintptr_t;
using Dims = std::tuple<int64_t, int64_t, int64_t>;  // n, k, group

const void* at(Address address) { return reinterpret_cast<const void*>(address); }

// codes, scales, offsets; whether scales are f32; whether codes are of NF4; pattern, starts and
// places of a sparse matrix
memlm_linear linear(Address codes, Address scales, Address offsets, bool f32, bool nf4, Dims dims,
                    int bits, int mode, Address bias, int pattern, Address starts, Address places) {
  const auto [n, k, group] = dims;
  memlm_linear made = {};
  memlm_packed& w = made.w;
  w.codes = at(codes);
  w.scales = at(scales);
  w.offsets = at(offsets);
  w.scale_dtype = f32 ? MEMLM_F32 : MEMLM_F16;
  w.n = n;
  w.k = k;
  w.group = group;
  w.levels = nf4 ? memlm_nf4_levels : nullptr;
  w.pattern = static_cast<memlm_pattern>(pattern);
  w.starts = static_cast<const int64_t*>(at(starts));
  w.places = at(places);
  static const char nothing[64] = {};  // codes and scales of no blocks
  if (w.pattern == MEMLM_BLOCKS && !w.codes) {
    w.codes = nothing;
    w.scales = bits < 16 ? nothing : nullptr;
  }
  made.bits = bits;
  made.mode = static_cast<memlm_mode>(mode);
  made.bias = at(bias);
  return made;
}

memlm_decoder_layer layer(Address input_norm, Address post_norm, Address q_norm, Address k_norm,
                          float norm_eps, const memlm_linear& qkv, const memlm_linear& o,
                          const memlm_linear& gate_up, const memlm_linear& down, int64_t window) {
  return {at(input_norm), at(post_norm), at(q_norm), at(k_norm), norm_eps, qkv, o, gate_up, down, window};
}

// A type of our own: pybind would copy a vector from and to a list.
struct Layers {
  std::vector<memlm_decoder_layer> list;

  explicit Layers(const std::vector<const memlm_decoder_layer*>& layers) {
    for (const memlm_decoder_layer* one : layers) list.push_back(*one);
  }
};

using PoolShape = std::tuple<int64_t, int64_t, int64_t, int64_t, int, int64_t, int64_t, int64_t>;

void run(const Layers& layers, const std::vector<Address>& blocks, const std::vector<Address>& tails,
         PoolShape pool, int64_t count, Address rows, Address lengths, Address tables,
         int64_t table_stride, Address tail_of, Address x, int64_t x_stride, int dtype,
         int64_t hidden, int64_t heads, Address cos, Address sin, int64_t angles, int64_t angle_stride,
         Address positions, int threads) {
  if (blocks.size() != layers.list.size())
    throw py::value_error("blocks: expected one address for each layer");
  const auto [pool_count, block_tokens, kv_heads, head_dim, number, bytes, tail_count, tail_bytes] = pool;
  const auto type = static_cast<memlm_kv_type>(number);
  if (memlm_kv_block_bytes(type, block_tokens, head_dim) != bytes ||
      memlm_kv_tail_bytes(type, block_tokens, head_dim) != tail_bytes)
    throw py::value_error("pool: its blocks are of another size than the library's");
  if (tail_bytes && tails.size() != blocks.size())
    throw py::value_error("tails: expected one address for each layer");
  std::vector<memlm_kv_pool> pools;
  for (size_t i = 0; i < blocks.size(); ++i)
    pools.push_back({const_cast<void*>(at(blocks[i])), pool_count, block_tokens, kv_heads, head_dim, type,
                     tail_bytes ? const_cast<void*>(at(tails[i])) : nullptr, tail_count});
  const memlm_sequences sequences = {count, static_cast<const int64_t*>(at(rows)),
                                     static_cast<const int64_t*>(at(lengths)),
                                     static_cast<const int32_t*>(at(tables)), table_stride,
                                     static_cast<const int32_t*>(at(tail_of))};
  memlm_decoder_args args = {};
  args.x = const_cast<void*>(at(x));
  args.x_stride = x_stride;
  args.dtype = static_cast<memlm_dtype>(dtype);
  args.hidden = hidden;
  args.heads = heads;
  args.cos = static_cast<const float*>(at(cos));
  args.sin = static_cast<const float*>(at(sin));
  args.angles = angles;
  args.angle_stride = angle_stride;
  args.positions = static_cast<const int64_t*>(at(positions));
  args.threads = threads;
  memlm_status status;
  {
    py::gil_scoped_release release;
    status = memlm_decoder_layers(layers.list.data(), static_cast<int64_t>(blocks.size()),
                                  pools.data(), &sequences, &args);
  }
  if (status == MEMLM_NO_MEMORY) throw std::bad_alloc();
  if (status != MEMLM_OK) throw py::value_error(memlm_last_error());
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<memlm_linear>(m, "LinearArguments")
      .def(py::init(&linear), py::arg("codes"), py::arg("scales"), py::arg("offsets"), py::arg("f32"),
           py::arg("nf4"), py::arg("dims"), py::arg("bits"), py::arg("mode"), py::arg("bias"),
           py::arg("pattern"), py::arg("starts"), py::arg("places"));
  py::class_<memlm_decoder_layer>(m, "LayerArguments")
      .def(py::init(&layer), py::arg("input_norm"), py::arg("post_norm"), py::arg("q_norm"),
           py::arg("k_norm"), py::arg("norm_eps"), py::arg("qkv"), py::arg("o"), py::arg("gate_up"),
           py::arg("down"), py::arg("window"));
  py::class_<Layers>(m, "DecoderLayers")
      .def(py::init<const std::vector<const memlm_decoder_layer*>&>(), py::arg("layers"))
      .def("__call__", &run, py::arg("blocks"), py::arg("tails"), py::arg("pool"), py::arg("count"),
           py::arg("rows"), py::arg("lengths"), py::arg("tables"), py::arg("table_stride"),
           py::arg("tail_of"), py::arg("x"), py::arg("x_stride"), py::arg("dtype"), py::arg("hidden"),
           py::arg("heads"), py::arg("cos"), py::arg("sin"), py::arg("angles"), py::arg("angle_stride"),
           py::arg("positions"), py::arg("threads"),
           "memlm_decoder_layers; pool: count, block_tokens, kv_heads, head_dim, type, bytes of a block, "
           "tails, bytes of a tail.");
}

}  // namespace memlm
