/* memlm from C: packs a float matrix into int8-row, multiplies, compares with plain loops.
 *
 *   folder=$(python -c 'import memlm.cpu; print(memlm.cpu.lib_path().parent)')
 *   include=$(python -c 'import memlm.cpu; print(memlm.cpu.include_path())')
 *   cc matmul.c -I$include -L$folder -lmemlm -Wl,-rpath,$folder -o matmul && ./matmul
 */
#include <memlm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum {
  M = 3, N = 50, K = 100,       /* any sizes do */
  ROWS = 16, LANE = 4,          /* a block: 16 rows of W, 4 consecutive k each */
  TILES = (N + ROWS - 1) / ROWS,
  PADDED = (K + 31) / 32 * 32,
};

static float random_float(void) { return (float)rand() / (float)RAND_MAX - 0.5f; }

int main(void) {
  static float x[M][K], w[N][K], y[M][N];
  for (int i = 0; i < M * K; ++i) x[0][i] = random_float();
  for (int i = 0; i < N * K; ++i) w[0][i] = random_float();

  /* memlm/formats.py draws this.  What is not set stays zero: padding never reaches a result. */
  static int8_t codes[TILES][PADDED / LANE][ROWS][LANE];
  static float scales[TILES][1][ROWS];
  for (int n = 0; n < N; ++n) {
    float largest = 0;
    for (int k = 0; k < K; ++k) {
      const float size = w[n][k] < 0 ? -w[n][k] : w[n][k];
      if (size > largest) largest = size;
    }
    const float scale = largest / 127;
    scales[n / ROWS][0][n % ROWS] = scale;
    for (int k = 0; k < K; ++k) {
      const float q = w[n][k] / scale;
      codes[n / ROWS][k / LANE][n % ROWS][k % LANE] = (int8_t)(q < 0 ? q - 0.5f : q + 0.5f);
    }
  }

  const memlm_packed packed = {
      .codes = codes, .scales = scales, .scale_dtype = MEMLM_F32, .n = N, .k = K, .group = 0};
  const memlm_matmul_args args = {.m = M, .x = x, .x_stride = K, .y = y, .y_stride = N,
                                  .dtype = MEMLM_F32, .fast = 0, .threads = 2};
  if (memlm_w8_matmul(&packed, &args) != MEMLM_OK) {
    fprintf(stderr, "%s\n", memlm_last_error());
    return 1;
  }

  double largest_error = 0;
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      double exact = 0;
      for (int k = 0; k < K; ++k) {
        const int8_t code = codes[n / ROWS][k / LANE][n % ROWS][k % LANE];
        exact += (double)x[m][k] * code * scales[n / ROWS][0][n % ROWS];
      }
      const double error = y[m][n] > exact ? y[m][n] - exact : exact - y[m][n];
      if (error > largest_error) largest_error = error;
    }
  printf("%s: largest error %.1e\n", memlm_isa(), largest_error);

  memlm_matmul_args wrong = args;
  wrong.x_stride = 1;
  if (memlm_w8_matmul(&packed, &wrong) != MEMLM_INVALID) return 1;
  printf("refused: %s\n", memlm_last_error());
  return largest_error < 1e-5 ? 0 : 1;
}
