// memlm._core: what Python needs of the library without torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "formats.h"
#include "include/memlm.h"
#include "include/memlm_limits.h"

namespace py = pybind11;

namespace memlm {
void bind_arrays(py::module_& m);   // arrays.cpp
void bind_decoder(py::module_& m);  // decoder_bind.cpp
}

PYBIND11_MODULE(_core, m) {
  m.doc() = "memlm's C ABI without torch, and the constants of the formats.";
  m.attr("FORMAT_VERSION") = memlm::kFormatVersion;
  m.attr("TILE_ROWS") = memlm::kTileRows;
  m.attr("LANE_K") = memlm::kLaneK;
  m.attr("ACT_GROUP") = memlm::kActGroup;
  m.def("padded_k", &memlm::padded_k, py::arg("k"), py::arg("group"));
  m.def("isa", [] { return std::string(memlm_isa()); });
  m.def("tile_rows", [](bool fast) { return memlm_tile_rows(fast); }, py::arg("fast"));
  m.attr("NF4_LEVELS") = std::vector<float>(memlm_nf4_levels, memlm_nf4_levels + 16);
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const char* const* name = memlm_isas(); *name; ++name) names.emplace_back(*name);
    return names;
  });
  m.def("kv_block_bytes", [](int type, int64_t block_tokens, int64_t head_dim) {
    return memlm_kv_block_bytes(static_cast<memlm_kv_type>(type), block_tokens, head_dim);
  }, py::arg("type"), py::arg("block_tokens"), py::arg("head_dim"));
  m.def("kv_tail_bytes", [](int type, int64_t block_tokens, int64_t head_dim) {
    return memlm_kv_tail_bytes(static_cast<memlm_kv_type>(type), block_tokens, head_dim);
  }, py::arg("type"), py::arg("block_tokens"), py::arg("head_dim"));
  m.def("limit_dram_gbps", memlm_limit_dram_gbps, py::arg("threads"), py::arg("bytes"),
        py::arg("huge_pages"), py::arg("repeats"), py::call_guard<py::gil_scoped_release>());
  m.def("limit_f32_gmacs", memlm_limit_f32_gmacs, py::arg("threads"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>());
  m.def("limit_i8_gmacs", memlm_limit_i8_gmacs, py::arg("threads"), py::arg("repeats"),
        py::call_guard<py::gil_scoped_release>());
  m.def("set_isa", [](const std::string& name) {
    if (memlm_set_isa(name.c_str()) != MEMLM_OK) throw py::value_error(memlm_last_error());
  }, py::arg("name"));
  memlm::bind_arrays(m);
  memlm::bind_decoder(m);
}
