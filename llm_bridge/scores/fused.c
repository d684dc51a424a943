/* `fused`: squares of per-trajectory weight gradients, and their weighted sums, while each block is in registers.
   `gram`: the lower half of a Gram matrix, which is all of it.
   `fold`: columns signed and added up in a few buckets.

   D_i = left_i^T right_i of trajectory i, which has the rows begin[i] .. end[i]-1 of left (N, rows) and right (N, cols):

       norm[i]   = ||D_i||^2                         over the rows top .. bottom-1 of D_i
       total[k]  += factor[k n + i] D_i              for every sum k; i = first[k] overwrites
       total[i]   = D_i                              without factors

   A product leaves its entries in HEIGHT x WIDTH registers; there they are squared and added up. That costs 1/T of the
   product, where a block that is written and read again costs a multiple of it.

   Both are copied once, panel by panel (WIDTH columns of right, HEIGHT of left, a trajectory's steps after each other),
   so that the inner loop reads them in a row; the panels of right may be `packed` by an earlier call, if they hold all
   its columns. Sums are gone through in bands of rows that stay in cache. */

#include <stddef.h>
#include <string.h>

/* REAL is float or double. Registers of the machine: HEIGHT x VECTORS sums, VECTORS of right and one of left */
#if defined(__AVX512F__)
enum { BYTES = 64, HEIGHT = 12 };
#elif defined(__AVX__)
enum { BYTES = 32, HEIGHT = 6 };
#elif defined(__aarch64__)
enum { BYTES = 16, HEIGHT = 12 };
#else
enum { BYTES = 16, HEIGHT = 4 };
#endif
enum { LANES = BYTES / sizeof(REAL), VECTORS = 2, WIDTH = LANES * VECTORS, CHAINS = 4 };

typedef REAL vector __attribute__((vector_size(BYTES), aligned(sizeof(REAL))));

#define EACH                              \
    _Pragma("GCC unroll 16")              \
    for (int r = 0; r < tall; r++)        \
        _Pragma("GCC unroll 2")           \
        for (int v = 0; v < VECTORS; v++)

ptrdiff_t height(void) { return HEIGHT; }
ptrdiff_t width(void) { return WIDTH; }

/* columns from .. to-1 of some rows, panel by panel: a row is read from end to end, as memory likes it */
static void pack(REAL *out, ptrdiff_t wide, const REAL *in, ptrdiff_t step, ptrdiff_t from, ptrdiff_t to, ptrdiff_t steps)
{
    for (ptrdiff_t t = 0; t < steps; t++, in += step) {
        REAL *to_row = out + t * wide;
        ptrdiff_t j = from;
        for (; j + wide <= to; j += wide, to_row += steps * wide)
            memcpy(to_row, in + j, wide * sizeof(REAL));
        if (j < to) {
            memset(to_row, 0, wide * sizeof(REAL));
            memcpy(to_row, in + j, (to - j) * sizeof(REAL));
        }
    }
}

/* A tile of D_i, at most `tall` x WIDTH, of which `high` x `wide` are there: y (steps, HEIGHT), x (steps, WIDTH). Made once
   for each `tall`, so that the last rows cost no more than they are. */
static inline __attribute__((always_inline)) void tile(
    const int tall, const vector *x, const REAL *y, ptrdiff_t steps, ptrdiff_t high, ptrdiff_t wide, ptrdiff_t at,
    ptrdiff_t cols, ptrdiff_t i, ptrdiff_t n, ptrdiff_t sums, const REAL *factor, const ptrdiff_t *first,
    REAL *const *total, vector *squares)
{
    vector d[HEIGHT][VECTORS];
    EACH d[r][v] = (vector){0};
    for (ptrdiff_t t = 0; t < steps; t++, x += VECTORS, y += HEIGHT)
        EACH d[r][v] += y[r] * x[v];
    EACH squares[(r * VECTORS + v) % CHAINS] += d[r][v] * d[r][v];

    for (ptrdiff_t k = factor ? 0 : i; k < (factor ? sums : i + 1); k++) {
        REAL f = factor ? factor[k * n + i] : 1, *c = total[k] + at;
        int overwrite = !factor || i == first[k];
        if (f == 0)
            continue;
        if (wide < WIDTH || high < tall) {
            REAL edge[HEIGHT][WIDTH];
            EACH *(vector *)(edge[r] + v * LANES) = d[r][v];
            for (ptrdiff_t r = 0; r < high; r++)
                for (ptrdiff_t w = 0; w < wide; w++)
                    c[r * cols + w] = f * edge[r][w] + (overwrite ? 0 : c[r * cols + w]);
        } else if (overwrite) {
            EACH *(vector *)(c + r * cols + v * LANES) = f * d[r][v];
        } else {
            EACH *(vector *)(c + r * cols + v * LANES) += f * d[r][v];
        }
    }
}

/* `own` holds max T x band numbers, `panels` N x (columns at once, up to a multiple of WIDTH); band is a multiple of HEIGHT */
void fused(const REAL *left, ptrdiff_t left_step, const REAL *right, ptrdiff_t right_step, ptrdiff_t cols,
           ptrdiff_t at_once, ptrdiff_t band, ptrdiff_t n, const ptrdiff_t *begin, const ptrdiff_t *end, ptrdiff_t top,
           ptrdiff_t bottom, ptrdiff_t sums, const REAL *factor, const ptrdiff_t *first, REAL *const *total,
           double *square, REAL *own, REAL *panels, ptrdiff_t packed, REAL *norm)
{
    memset(square, 0, n * sizeof(double));
    for (ptrdiff_t near = 0; near < cols; near += at_once) {
        ptrdiff_t far = cols - near < at_once ? cols : near + at_once;
        ptrdiff_t count = (far - near + WIDTH - 1) / WIDTH;
        REAL *out = panels;
        for (ptrdiff_t i = 0; i < n && !packed; out += count * (end[i] - begin[i]) * WIDTH, i++)
            pack(out, WIDTH, right + begin[i] * right_step, right_step, near, far, end[i] - begin[i]);

        for (ptrdiff_t from = top; from < bottom; from += band) {
            ptrdiff_t to = bottom - from < band ? bottom : from + band;
            const REAL *panel = panels;
            for (ptrdiff_t i = 0; i < n; i++) {
                ptrdiff_t steps = end[i] - begin[i];
                pack(own, HEIGHT, left + begin[i] * left_step, left_step, from, to, steps);
                for (ptrdiff_t row = from; row < to; row += HEIGHT) {
                    ptrdiff_t high = to - row < HEIGHT ? to - row : HEIGHT;
                    vector squares[CHAINS] = {{0}}; /* one chain of additions would wait for itself */
                    for (ptrdiff_t q = 0; q < count; q++) {
                        ptrdiff_t j = near + q * WIDTH, wide = far - j < WIDTH ? far - j : WIDTH;
#define TILE(tall)                                                                                                 \
    tile(tall, (const vector *)(panel + q * steps * WIDTH), own + (row - from) * steps, steps, high, wide,         \
         row * cols + j, cols, i, n, sums, factor, first, total, squares)
                        if (high > 2 * HEIGHT / 3)
                            TILE(HEIGHT);
                        else if (high > HEIGHT / 3)
                            TILE(2 * HEIGHT / 3);
                        else
                            TILE(HEIGHT / 3);
                    }
                    for (int s = 0; s < CHAINS; s++)
                        for (int l = 0; l < LANES; l++)
                            square[i] += squares[s][l];
                }
                panel += count * steps * WIDTH;
            }
        }
    }
    for (ptrdiff_t i = 0; i < n; i++)
        norm[i] = square[i];
}

/* The entries of x_i x_i^T, x_i the rows begin[i] .. end[i]-1 of x (N, cols), in tiles of SIDE x SIDE on and below the
   diagonal, from out[i] on; those below count sqrt(2) times, so that <K, L> of two such is that of the whole matrices.
   Rows of x after a trajectory's are read, up to a whole tile, and come to nothing.

   A register holds the products of LANES columns of two rows. They are added up at the end, all entries at once. */

enum { SIDE = 4, HIGH = BYTES == 32 ? 2 : 4, ENTRIES = HIGH * SIDE };

#if defined(__GNUC__) && !defined(__clang__)
#define REGISTERS _Pragma("GCC unroll 16")
#define SCHEDULED __attribute__((optimize("schedule-insns"))) /* or each product loads its operands anew (GCC 12) */
typedef __typeof__((vector){0} < (vector){0}) places;

/* from pairs of lanes h apart: every sum of a, and of b, takes half the lanes it took */
static inline __attribute__((always_inline)) vector folded(vector a, vector b, int h)
{
    places low, high;
    REGISTERS
    for (int l = 0; l < LANES; l++) {
        low[l] = l / (2 * h) * 2 * h + l % h + (l / h % 2 ? LANES : 0);
        high[l] = low[l] + h;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

static inline __attribute__((always_inline)) void add_lanes(vector *d, REAL *out)
{
    REGISTERS
    for (int h = LANES / 2; h >= 1; h /= 2)
        REGISTERS
        for (int k = 0; k < ENTRIES / LANES * h; k++)
            d[k] = folded(d[k / h * 2 * h + k % h], d[k / h * 2 * h + k % h + h], h);
    REGISTERS
    for (int k = 0; k < ENTRIES / LANES; k++)
        *(vector *)(out + k * LANES) = d[k];
}
#else
#define REGISTERS
#define SCHEDULED
static inline void add_lanes(vector *d, REAL *out)
{
    for (int k = 0; k < ENTRIES; k++) {
        out[k] = 0;
        for (int l = 0; l < LANES; l++)
            out[k] += d[k][l];
    }
}
#endif

/* what LANES columns of HIGH and of SIDE rows, `step` apart, add to each entry */
static inline __attribute__((always_inline)) void add_columns(vector *d, const REAL *own, const REAL *other,
                                                              ptrdiff_t step)
{
    vector right[SIDE];
    REGISTERS
    for (int s = 0; s < SIDE; s++)
        right[s] = *(const vector *)(other + s * step);
    REGISTERS
    for (int r = 0; r < HIGH; r++) {
        vector left = *(const vector *)(own + r * step);
        REGISTERS
        for (int s = 0; s < SIDE; s++)
            d[r * SIDE + s] += left * right[s];
    }
}

ptrdiff_t side(void) { return SIDE; }

SCHEDULED void gram(const REAL *x, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t from, ptrdiff_t to, const ptrdiff_t *begin,
          const ptrdiff_t *end, REAL *const *out)
{
    const REAL below = 1.41421356237309504880;
    for (ptrdiff_t i = from; i < to; i++) {
        ptrdiff_t last = end[i] - 1;
        REAL *tile = out[i];
        for (ptrdiff_t a = begin[i]; a <= last; a += SIDE)
            for (ptrdiff_t b = begin[i]; b <= a; b += SIDE)
                for (ptrdiff_t top = a; top < a + SIDE; top += HIGH, tile += ENTRIES) {
                    const REAL *own = x + top * step, *other = x + b * step;
                    vector d[ENTRIES];
                    REGISTERS
                    for (int k = 0; k < ENTRIES; k++)
                        d[k] = (vector){0};
                    ptrdiff_t j = 0, whole = a + SIDE <= rows ? cols / LANES * LANES : 0;
                    for (; j < whole; j += LANES)
                        add_columns(d, own + j, other + j, step);
                    for (; j < cols; j += LANES) { /* the last columns; all of a tile with rows that x has not */
                        REAL rest[HIGH + SIDE][LANES] = {{0}};
                        for (int r = 0; r < HIGH + SIDE; r++) {
                            ptrdiff_t row = r < HIGH ? top + r : b + r - HIGH;
                            if (row < rows)
                                memcpy(rest[r], x + row * step + j, (cols - j < LANES ? cols - j : LANES) * sizeof(REAL));
                        }
                        add_columns(d, rest[0], rest[HIGH], LANES);
                    }
                    REGISTERS
                    for (int k = 0; k < ENTRIES; k++)
                        d[k] *= a == b ? 1 : below;
                    add_lanes(d, tile);
                    if (a + SIDE > end[i])
                        for (int k = 0; k < ENTRIES; k++)
                            if (top + k / SIDE > last || b + k % SIDE > last)
                                tile[k] = 0;
                }
    }
}

/* Columns of x (N, cols), each times its sign, added up: out (N, buckets). Column j goes to bucket
   (j mod buckets) xor turn[j / buckets]; `buckets` and LANES are powers of two, and `rest` has room for so many.

   FEW rows at a time: their sums stay in the nearest cache while the turn of a block of columns is set up once. */

enum { FEW = 8 };

ptrdiff_t few(void) { return FEW; }

static inline __attribute__((always_inline)) void turned(vector *sum, const REAL *in, const REAL *sign,
                                                         ptrdiff_t vectors, ptrdiff_t turn)
{
#if defined(__GNUC__) && !defined(__clang__)
    places near;
    for (int l = 0; l < LANES; l++)
        near[l] = l ^ turn % LANES;
    for (ptrdiff_t v = 0; v < vectors; v++)
        sum[v ^ turn / LANES] +=
            __builtin_shuffle(*(const vector *)(in + v * LANES) * *(const vector *)(sign + v * LANES), near);
#else
    for (ptrdiff_t k = 0; k < vectors * LANES; k++)
        ((REAL *)sum)[k ^ turn] += in[k] * sign[k];
#endif
}

static void fold_few(const REAL *x, ptrdiff_t step, ptrdiff_t rows, ptrdiff_t cols, ptrdiff_t buckets,
                     const REAL *sign, const int *turn, REAL *rest, REAL *out)
{
    ptrdiff_t vectors = buckets / LANES;
    memset(out, 0, rows * buckets * sizeof(REAL));
    for (ptrdiff_t j = 0; j < cols; j += buckets) {
        vector *sum = (vector *)out;
        const REAL *in = x + j;
        for (ptrdiff_t row = 0; row < rows; row++, in += step, sum += vectors) {
            const REAL *some = in;
            if (cols - j < buckets) {
                memset(rest, 0, buckets * sizeof(REAL));
                some = memcpy(rest, in, (cols - j) * sizeof(REAL));
            }
            turned(sum, some, sign + j, vectors, turn[j / buckets]);
        }
    }
}

void fold(const REAL *x, ptrdiff_t step, ptrdiff_t cols, ptrdiff_t top, ptrdiff_t bottom, ptrdiff_t buckets,
          const REAL *sign, const int *turn, REAL *rest, REAL *out)
{
    for (ptrdiff_t row = top; row < bottom; row += FEW)
        fold_few(x + row * step, step, bottom - row < FEW ? bottom - row : FEW, cols, buckets, sign, turn, rest,
                 out + row * buckets);
}

/* square[i] = ||left_i^T other_i||^2, left (N, cols) folded where it is read and other (N, buckets) before; `rest` has
   room for (buckets + FEW + 1) x buckets */
void sketch(const REAL *left, ptrdiff_t step, ptrdiff_t cols, ptrdiff_t from, ptrdiff_t to, const ptrdiff_t *begin,
            const ptrdiff_t *end, ptrdiff_t buckets, const REAL *sign, const int *turn, const REAL *other, REAL *rest,
            double *square)
{
    REAL *few = rest + buckets, *block = few + FEW * buckets;
    ptrdiff_t vectors = buckets / LANES;
    for (ptrdiff_t i = from; i < to; i++) {
        memset(block, 0, buckets * buckets * sizeof(REAL));
        for (ptrdiff_t row = begin[i]; row < end[i]; row += FEW) {
            ptrdiff_t rows = end[i] - row < FEW ? end[i] - row : FEW;
            fold_few(left + row * step, step, rows, cols, buckets, sign, turn, rest, few);
            memset(few + rows * buckets, 0, (FEW - rows) * buckets * sizeof(REAL));
            for (ptrdiff_t v = 0; v < vectors; v++) {
                vector right[FEW];
                for (int r = 0; r < FEW; r++)
                    right[r] = r < rows ? ((const vector *)(other + (row + r) * buckets))[v] : (vector){0};
                for (ptrdiff_t a = 0; a < buckets; a++) {
                    vector sum = ((vector *)(block + a * buckets))[v];
                    for (int r = 0; r < FEW; r++)
                        sum += few[r * buckets + a] * right[r];
                    ((vector *)(block + a * buckets))[v] = sum;
                }
            }
        }
        vector sum = {0};
        for (ptrdiff_t k = 0; k < buckets * vectors; k++)
            sum += ((vector *)block)[k] * ((vector *)block)[k];
        square[i] = 0;
        for (int l = 0; l < LANES; l++)
            square[i] += sum[l];
    }
}
