// The C ABI of pyft's native kernels: plain pointers, sizes, a stream. No torch, no Python.
//
// Every function returns a pyft_status and checks nothing it would have to read device memory for. Sizes count
// elements, never bytes; strides count elements of the pointed-to type. Layouts and rounding rules are those of
// pyft/formats.py.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PYFT_OK = 0,
  PYFT_BAD_ARGUMENT = 1,  // a size, dtype or block size outside the documented range
  PYFT_BAD_ISA = 2,       // the instruction set asked for is not available on this CPU
  PYFT_CUDA_ERROR = 3,    // pyft_cuda_error_string() says what the CUDA runtime answered
} pyft_status;

typedef enum { PYFT_F32 = 0, PYFT_F16 = 1, PYFT_BF16 = 2 } pyft_dtype;

typedef enum { PYFT_ISA_SCALAR = 0, PYFT_ISA_AVX2 = 1, PYFT_ISA_AVX512 = 2 } pyft_isa;

// How a weight is coded: a Format of pyft/formats.py.
typedef struct {
  int bits;                 // 4: two codes a byte, first element in the high nibble; 8
  int zero_code;            // what every element of a block with scale 0 stores
  float top;                // a block's span is divided by it to give its scale
  int e8m0;                 // scales are uint8: the biased exponent of that quotient
  const float* thresholds;  // fp32 [2^bits - 1], ascending
  const uint8_t* order;     // [2^bits], the code of each level
} pyft_coding;

// A quantized weight of `rows` x `cols` elements, as in pyft/formats.py.
typedef struct {
  int bits;                  // 4 or 8
  const uint8_t* packed;     // [ceil(rows * cols * bits / 8)]
  const void* scales;        // fp32 [blocks], or uint8 [blocks] when `scale_codes` is set
  const uint8_t* zeros;      // uint8 [blocks], or NULL: no zero points
  const float* nested;       // fp32 [ceil(blocks / 256)], or NULL: scale_codes are the scales themselves
  const float* offset;       // fp32 [1], set when `nested` is
  const float* codes;        // fp32 [2^bits]
  const float* scale_codes;  // fp32 [256] or NULL
  int64_t rows, cols;
  int64_t block_size;  // elements a block: a power of two, 32 .. 4096, or cols; blocks = ceil(rows * cols / block_size)
} pyft_weight;

// A rectangle of a weight: rows [row_begin, row_end), columns [col_begin, col_end).
typedef struct {
  int64_t row_begin, row_end, col_begin, col_end;
} pyft_slab;

// ---- optimizers with 8-bit states: the equations and the coding of states are those of pyft/reference/optim.py -----

typedef enum { PYFT_ADAMW = 0, PYFT_LION = 1, PYFT_SGD = 2 } pyft_optimizer;

// One parameter. A state is uint8 codes [n] with its absmax fp32 [ceil(n / 256)], or fp32 [n] where absmax is NULL.
typedef struct {
  void* param;       // [n] in the call's dtype
  const void* grad;  // [n] in the call's dtype
  void* first;       // m
  void* second;      // v; AdamW only
  float* first_absmax;
  float* second_absmax;
  int64_t n;      // at least 1
  int64_t block;  // blocks of 256 elements in all tensors before this one
} pyft_optim_tensor;

typedef struct {
  pyft_optimizer algorithm;
  int nesterov;
  float sign, beta1, rest1, beta2, rest2, keep, decay, step, eps;
} pyft_optim_rule;

// How many entries a row of `starts` has (three are padding), and how a magnitude finds its own: the exponent and the
// first 7 bits of the mantissa, counted from 2^-23.
enum { PYFT_OPTIM_MANTISSA = 7, PYFT_OPTIM_BUCKETS = (23 << 7) + 4 };

typedef struct {
  const float*
      codes;  // fp32 [4][256]: the signed map, its midpoints and +inf, the unsigned map, its midpoints and +inf
  const uint8_t* starts;  // [3][PYFT_OPTIM_BUCKETS]: least code of a bucket: signed x >= 0, signed x < 0, unsigned
} pyft_optim_maps;

// ---- norms, rotary embedding, activations: the equations are those of pyft/reference/{norm,rope,glu}.py ------------
//
// Matrices are [rows, cols] in the call's dtype with adjacent columns and their own distance of rows, `..._stride`
// (outputs: at least cols); arithmetic is fp32, rounded once.

// y = (h - mean) rstd (offset + weight) + bias, h = x + residual rounded to the dtype.
typedef struct {
  int64_t rows, cols;
  const void* x;
  const void* residual;  // or NULL: h is x
  const void* weight;    // [cols], or NULL: offset + weight is 1
  const void* bias;      // [cols] or NULL
  void* y;
  void* h;      // set when `residual` is
  float* mean;  // fp32 [rows], or NULL: 0 (rms_norm)
  float* rstd;  // fp32 [rows]
  int64_t x_stride, residual_stride, y_stride, h_stride;
  float eps, offset;
} pyft_norm;

// dx = rstd (g - [mean is set] mean(g) - xhat mean(g xhat)) + dh with xhat = (h - mean) rstd and
// g = dy (offset + weight). Part p of dweight and dbias is the sum of dy xhat and of dy over rows
// [p each, (p + 1) each), each = ceil(rows / parts).
typedef struct {
  int64_t rows, cols, parts;
  const void* dy;
  const void* h;
  const void* weight;  // [cols], or NULL: offset + weight is 1
  const void* dh;      // or NULL: no gradient arrives at h itself
  const float* mean;   // fp32 [rows], or NULL: 0
  const float* rstd;   // fp32 [rows]
  void* dx;
  float* dweight;  // fp32 [parts, cols] or NULL
  float* dbias;    // fp32 [parts, cols] or NULL
  int64_t dy_stride, h_stride, dh_stride, dx_stride;
  float offset;
} pyft_norm_backward;

// x [batch, heads, seq, dim] -> out of the same shape, each with its own distances; out may be x.
typedef struct {
  const void* x;
  void* out;
  int64_t heads;
  int64_t x_batch, x_head, x_seq;
  int64_t out_batch, out_head, out_seq;
} pyft_heads;

// Pairs (i, i + half), or (2 i, 2 i + 1) where interleaved, of the first 2 half of dim elements are turned by their
// token's angle, the others copied.
typedef struct {
  int64_t batch, seq, dim, half;
  const void* cos;  // [batch, seq, half], or tables [any, half] whose rows `positions` names
  const void* sin;
  pyft_dtype table_dtype;      // the call's, or PYFT_F32
  int64_t cos_batch, cos_row;  // distances; 0: one row for all
  int64_t sin_batch, sin_row;
  const int64_t* positions;  // [batch, seq] or NULL
  int64_t positions_batch, positions_seq;
  int interleaved;
  int inverse;  // by the negative angle
} pyft_rope;

typedef enum { PYFT_SILU = 0, PYFT_GELU = 1, PYFT_GELU_TANH = 2, PYFT_RELU2 = 3 } pyft_activation;

// out = activation(gate) up
typedef struct {
  int64_t rows, cols;
  pyft_activation activation;
  const void* gate;
  const void* up;  // or NULL: 1
  void* out;
  int64_t gate_stride, up_stride, out_stride;
} pyft_glu;

// The gradients of gate and up, and out once more. An output may be the memory of an input.
typedef struct {
  int64_t rows, cols;
  pyft_activation activation;
  const void* dy;
  const void* gate;
  const void* up;  // or NULL: 1
  void* dgate;
  void* dup;  // or NULL
  void* out;  // or NULL
  int64_t dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, out_stride;
} pyft_glu_backward;

// ---- attention: the equations are those of pyft/reference/attention.py ---------------------------------------------

// A tensor [batch, heads, seq, dim] of the call's dtype; elements of dim adjacent.
typedef struct {
  void* data;  // or NULL: a gradient that nobody wants
  int64_t batch_stride, head_stride, seq_stride;
} pyft_head_view;

// Bounds of the keys a query sees that are not there.
#define PYFT_UNBOUNDED INT64_MAX

// Query i of a sequence with nq queries and nk keys stands at p = i + nk - nq + shift. It sees key j when
// p - left <= j <= p + right. Of those, with s the scale q·k, capped, plus bias, minus slope |p - j|:
//   P = exp(s - lse), lse = log(sum exp(s) + exp(sink)), o = sum dropped(P) v
// A query that sees nothing: o = 0, lse = sink, or -infinity where there is no sink.
typedef struct {
  int64_t batch, q_heads, kv_heads, q_len, k_len, dim, v_dim;  // query head h reads key head h / (q_heads / kv_heads)
  pyft_head_view q, k, v;
  const float* sinks;   // fp32 [q_heads] or NULL
  const float* slopes;  // fp32 [batch, q_heads] or NULL
  const void* bias;     // [batch, q_heads, q_len, k_len], or NULL
  pyft_dtype bias_dtype;
  int64_t bias_strides[4];      // 0 where one value serves all
  const int32_t* cu_seqlens_q;  // [sequences + 1], ascending from 0 to q_len, or NULL: one sequence a row; batch is 1
  const int32_t* cu_seqlens_k;  // set when cu_seqlens_q is
  int64_t sequences;
  float scale;
  float softcap;  // s becomes softcap tanh(s / softcap); 0: as it is
  int64_t left, right, shift;
  // dropout: P of query token i and key j of its sequence is kept and times `keep`, where word e of the random words
  // of `seed` (pyft_cpu_dropout's) >= threshold, e = ((b q_heads + h) q_len + i) pitch + j with pitch = k_len rounded
  // up to a multiple of 4; i counts from the beginning of the row, not of the sequence. threshold 0: no dropout
  uint64_t seed;
  uint32_t threshold;
  float keep;
} pyft_attention;

// delta = the sum of o times d_o over dim, minus d_lse: what all the gradients of a row have in common.
//   dS = P (kept(dP) - delta), dP = d_o·v; times 1 - (s / softcap)^2 where capped, it is dq = scale dS k and
//   dk = scale dSᵀ q; dv = dropped(P)ᵀ d_o; d_bias = dS as it is before the cap, summed over what one value served
typedef struct {
  pyft_head_view d_o;  // [batch, q_heads, q_len, v_dim]
  const float* lse;    // fp32 [batch, q_heads, q_len]
  const float* delta;  // fp32 [batch, q_heads, q_len]
  pyft_head_view dq, dk, dv;
} pyft_attention_backward;

// ---- logits: the equations are those of pyft/reference/logits.py ---------------------------------------------------

// A matrix [rows, cols] in the call's dtype as the head gives it, its rows `stride` apart. u = softcap tanh(scale z /
// softcap), or scale z where softcap is 0.
typedef struct {
  void* data;
  int64_t stride;
  float scale, softcap;
} pyft_logit_view;

// The logits of some rows and what is known of them.
typedef struct {
  int64_t rows, cols;
  pyft_logit_view logits;
  const int64_t* labels;       // [rows]; one outside [0, cols) names no column
  const float* class_weights;  // [cols], or NULL: 1
  pyft_logit_view teacher;     // data is NULL where there is none
  const float* teacher_lse;    // [rows], set when teacher.data is: q_c = exp(u_c - lse) of the teacher's
} pyft_logits;

// fp32 [rows] and argmax int64 [rows]; all but lse may be NULL. cross needs a teacher, t its u. argmax is the first of
// the largest; where a row holds NaN it is some column, and the others but target are NaN.
typedef struct {
  float *lse, *target, *smooth, *mean, *cross, *top;
  int64_t* argmax;
} pyft_logit_statistics;

// fp32 [rows]; mean is set when g_mean is; g_smooth, g_mean and g_cross may be NULL: 0.
typedef struct {
  const float *lse, *mean, *g_lse, *g_target, *g_smooth, *g_mean, *g_cross;
  float threshold;  // of p
  uint8_t* kept;    // [cols] or NULL: set to 1 where p >= threshold in a row, or a row's label is; never to 0
} pyft_logit_gradient;

// ---- CPU ----------------------------------------------------------------------------------------------------------

// The best instruction set this CPU and its operating system support.
pyft_isa pyft_cpu_best_isa(void);

// Asks the operating system for 2 MiB pages behind memory that nothing has been written to yet; `bytes` long.
pyft_status pyft_cpu_use_huge_pages(void* memory, int64_t bytes);

// x [n] in `dtype` -> packed [ceil(n * bits / 8)], scales [blocks] (fp32, or uint8 when coding->e8m0) and, where
// `zeros` is not NULL, a zero point for each block. With 4 bits block_size is even.
pyft_status pyft_cpu_quantize(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size, const pyft_coding* coding,
                              uint8_t* packed, void* scales, uint8_t* zeros, pyft_isa isa, int threads);

// The slab of the weight -> out, whose row r starts at out + (r - row_begin) * out_stride.
pyft_status pyft_cpu_dequantize(const pyft_weight* weight, const pyft_slab* slab, void* out, int64_t out_stride,
                                pyft_dtype dtype, pyft_isa isa, int threads);

// y = x Wᵀ + bias: x [m, cols] and y [m, rows] in `dtype`, rows any distance apart; bias [rows] or NULL. W is rounded
// to `dtype` as pyft_cpu_dequantize does; sums are fp32, rounded once. For small m (the weight is decoded on the fly).
pyft_status pyft_cpu_qlinear(const void* x, int64_t m, int64_t x_stride, const pyft_weight* weight, const void* bias,
                             void* y, int64_t y_stride, pyft_dtype dtype, pyft_isa isa, int threads);

// out[i] = keep(i) ? x[i] * scale : 0 for i in [0, n); keep(i): word i % 4 of Philox4x32-10(counter i / 4, key seed)
// >= threshold. The product is taken in fp32 and rounded once to `dtype`.
pyft_status pyft_cpu_dropout(const void* x, pyft_dtype dtype, int64_t n, uint64_t seed, uint32_t threshold, float scale,
                             void* out, int threads);

// One step of `count` tensors in place. A block of 256 elements with a new state that is not finite stays as it was.
// PYFT_ISA_AVX512 runs the AVX2 code on a CPU without VBMI.
pyft_status pyft_cpu_optim(const pyft_optim_tensor* tensors, int64_t count, pyft_dtype dtype,
                           const pyft_optim_rule* rule, const pyft_optim_maps* maps, pyft_isa isa, int threads);

pyft_status pyft_cpu_norm(const pyft_norm* norm, pyft_dtype dtype, pyft_isa isa, int threads);
pyft_status pyft_cpu_norm_backward(const pyft_norm_backward* norm, pyft_dtype dtype, pyft_isa isa, int threads);

// k may be NULL.
pyft_status pyft_cpu_rope(const pyft_rope* rope, const pyft_heads* q, const pyft_heads* k, pyft_dtype dtype,
                          pyft_isa isa, int threads);

pyft_status pyft_cpu_glu(const pyft_glu* glu, pyft_dtype dtype, pyft_isa isa, int threads);
pyft_status pyft_cpu_glu_backward(const pyft_glu_backward* glu, pyft_dtype dtype, pyft_isa isa, int threads);

// o [batch, q_heads, q_len, v_dim], lse fp32 [batch, q_heads, q_len].
pyft_status pyft_cpu_attention(const pyft_attention* attention, const pyft_head_view* o, float* lse, pyft_dtype dtype,
                               pyft_isa isa, int threads);

// delta fp32 [batch, heads, seq] of o and d_o [batch, heads, seq, dim]; d_lse has distances of its own, or is NULL.
pyft_status pyft_cpu_attention_delta(int64_t batch, int64_t heads, int64_t seq, int64_t dim, const pyft_head_view* o,
                                     const pyft_head_view* d_o, const float* d_lse, const int64_t d_lse_strides[3],
                                     float* delta, pyft_dtype dtype, pyft_isa isa, int threads);

// Gradients that are NULL are not computed.
pyft_status pyft_cpu_attention_backward(const pyft_attention* attention, const pyft_attention_backward* backward,
                                        pyft_dtype dtype, pyft_isa isa, int threads);

// d_bias: contiguous, of the bias's dtype, with 1 for each dimension whose bias_stride is 0.
pyft_status pyft_cpu_attention_bias_backward(const pyft_attention* attention, const pyft_attention_backward* backward,
                                             void* d_bias, pyft_dtype dtype, pyft_isa isa, int threads);

pyft_status pyft_cpu_logit_statistics(const pyft_logits* logits, const pyft_logit_statistics* statistics,
                                      pyft_dtype dtype, pyft_isa isa, int threads);

// dz in the place of z.
pyft_status pyft_cpu_logit_gradient(const pyft_logits* logits, const pyft_logit_gradient* gradient, pyft_dtype dtype,
                                    pyft_isa isa, int threads);

// ---- CUDA (pointers are device pointers; `stream` is a cudaStream_t) ---------------------------------------------

// Number of visible devices; 0 when there is no driver.
int pyft_cuda_device_count(void);

// The text of the last CUDA error this thread met in these functions.
const char* pyft_cuda_error_string(void);

// As pyft_cpu_quantize.
pyft_status pyft_cuda_quantize(const void* x, pyft_dtype dtype, int64_t n, int64_t block_size,
                               const pyft_coding* coding, uint8_t* packed, void* scales, uint8_t* zeros, void* stream);

// As pyft_cpu_dequantize; one launch, nested scales included.
pyft_status pyft_cuda_dequantize(const pyft_weight* weight, const pyft_slab* slab, void* out, int64_t out_stride,
                                 pyft_dtype dtype, void* stream);

// As pyft_cpu_qlinear; m <= 64.
pyft_status pyft_cuda_qlinear(const void* x, int64_t m, int64_t x_stride, const pyft_weight* weight, const void* bias,
                              void* y, int64_t y_stride, pyft_dtype dtype, void* stream);

// As pyft_cpu_optim, in one launch; `tensors` is in device memory and has `blocks` blocks in all. At most `grid` thread
// blocks share the work.
pyft_status pyft_cuda_optim(const pyft_optim_tensor* tensors, int64_t count, int64_t blocks, pyft_dtype dtype,
                            const pyft_optim_rule* rule, const pyft_optim_maps* maps, int grid, void* stream);

// As pyft_cpu_attention and its backward, in fp16 on every GPU and in bf16 from compute capability 8.0; without bias,
// slopes and dropout; dim and v_dim at most 256.
pyft_status pyft_cuda_attention(const pyft_attention* attention, const pyft_head_view* o, float* lse, pyft_dtype dtype,
                                void* stream);
pyft_status pyft_cuda_attention_delta(int64_t batch, int64_t heads, int64_t seq, int64_t dim, const pyft_head_view* o,
                                      const pyft_head_view* d_o, const float* d_lse, const int64_t d_lse_strides[3],
                                      float* delta, pyft_dtype dtype, void* stream);
pyft_status pyft_cuda_attention_backward(const pyft_attention* attention, const pyft_attention_backward* backward,
                                         pyft_dtype dtype, void* stream);

#ifdef __cplusplus
}
#endif
