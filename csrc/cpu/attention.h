// Attention in tiles of kQueries queries by kKeys keys: what the instruction sets provide, and what the threads share.
//
//                 keys, kKeys a tile
//             +----------+----------+--
//   kQueries  | tile     |          |        scores of a tile exist in one thread's scratch alone, turned: [keys]
//             +----------+----------+--      [queries], so that the lanes of a vector are queries and sums over
//             |          |          |        keys need no sums over lanes
//
// Each output element is one chain of sums in the order of keys (o, dq) or of heads and queries (dk, dv), whatever the
// order of tiles in time: the bits do not depend on the number of threads, nor on how the backward is scheduled.
#pragma once

#include <stdint.h>

#include "../pyft.h"

constexpr int64_t kQueries = 64, kKeys = 128;

inline int64_t tiles_of(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// One call: the forward has o and lse, the backward `backward`, the gradient of the bias d_bias too.
struct AttentionCall {
  const pyft_attention& attention;
  const pyft_head_view* o;
  float* lse;
  const pyft_attention_backward* backward;
  void* d_bias;
};

// Tokens of one batch row that see one another. Query i stands at i + offset and sees those keys j, 0 <= j < keys, with
// low <= j - i <= high.
struct Sequence {
  int64_t batch, q_begin, queries, k_begin, keys;
  int64_t offset, low, high;
};

// A part of the work that writes outputs of its own: of a head (a kv head where the outputs are keys'), the tiles of
// queries or keys numbered `tile`, or all; of d_bias, the tile of query and key.
struct AttentionItem {
  const Sequence* sequence;
  int64_t head, tile, key_tile;
};

using AttentionWork = void (*)(const AttentionCall& call, const AttentionItem& item, char* scratch);

// A kind of work and how many bytes of scratch it takes, aligned to 64.
struct AttentionPass {
  AttentionWork run;
  int64_t (*scratch)(const AttentionCall& call, int64_t most_keys);
};

// One table per instruction set, indexed by pyft_dtype.
struct AttentionKernels {
  struct Passes {
    AttentionPass forward;   // o and lse of a tile of queries
    AttentionPass by_query;  // dq of a tile of queries
    AttentionPass by_key;    // dk and dv of a tile of keys
    AttentionPass whole;     // all gradients of a kv head and the heads it serves
    AttentionPass bias;      // d_bias, a tile of it
    void (*delta)(const pyft_head_view& o, const pyft_head_view& d_o, int64_t batch, int64_t head, int64_t begin,
                  int64_t end, int64_t dim, const float* d_lse, int64_t d_lse_stride, float* delta);
  } of[3];
};

extern const AttentionKernels attention_scalar;
#ifdef PYFT_X86
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
extern const AttentionKernels attention_avx512bf16;  // bf16 alone: its products of pairs
#endif
