"""memlm without torch: packs a float matrix, multiplies numpy arrays with it, and JAX's where there
is JAX.

    python examples/numpy_matmul.py
"""

import sys

import numpy as np

from memlm import arrays


def main() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((1000, 500), np.float32)
    x = rng.standard_normal((3, 500), np.float32)

    packed = arrays.quantize(w, "int4")
    y = arrays.matmul(x, packed, mode="accurate")
    exact = x @ arrays.dequantize(packed).T
    print(f"numpy: largest error {np.abs(y - exact).max():.1e} of {np.abs(exact).max():.0f}")

    arrays.matmul(x, packed, out=y)  # into memory that is there, in the faster arithmetic
    print(f"the fast mode: largest error {np.abs(y - exact).max():.1e}")

    try:
        import jax.numpy as jnp
    except ImportError:
        print("jax: not installed")
    else:
        z = jnp.from_dlpack(arrays.matmul(jnp.asarray(x), packed))  # no copy either way
        print(f"jax: the same, {bool((z == y).all())}")
    print(f"torch imported: {'torch' in sys.modules}")


if __name__ == "__main__":
    main()
