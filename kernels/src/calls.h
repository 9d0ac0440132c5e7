// What a call of an operator consists of: its sizes, its tensors, and the memory that its threads share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "blocks.h"
#include "work.h"

namespace kernels {

// Rows up to which each thread prepares all activations for itself instead of waiting for others.
constexpr size_t kFewRows = 6;
// Positions in a tile of the KV cache, and in a chunk of attention. A chunk's sums depend on its positions alone.
constexpr size_t kTile = 16;
constexpr size_t kChunk = 128;
constexpr size_t kMostHeadDim = 256;

// Rows that a product takes at a time. Their activations lie together, so that one address leads to all of them.
constexpr size_t kGroup = 6;
// Rows in whole groups.
constexpr size_t Grouped(size_t rows) { return (rows + kGroup - 1) / kGroup * kGroup; }

// The left side of products: rows of numbers, as 8-bit codes with a scale for each block of 32, or as they are.
struct Activations {
  int8_t* codes = nullptr;  // [groups, inputs / 32, kGroup, 32]
  float* scales = nullptr;  // [groups, inputs / 32, kGroup, 2]: the scale, and the scale times the sum of the codes
  float* plain = nullptr;   // [rows, inputs]; used instead of both in float arithmetic
  size_t inputs = 0;
  bool in_float = false;

  // A block of a row among all blocks of 32.
  size_t at(size_t row, size_t block) const {
    return (row / kGroup * (inputs / kBlock) + block) * kGroup + row % kGroup;
  }

  // From `row` on, which begins a group.
  Activations from(size_t row) const {
    Activations rest = *this;
    rest.codes += row * inputs;
    rest.scales += row * (inputs / kBlock) * 2;
    rest.plain += row * inputs;
    return rest;
  }
};

// Items of a thread's piece, of one piece for each.
constexpr size_t Share(size_t items, size_t threads) { return (items + threads - 1) / threads; }

// Keys and values of a layer, of consecutive slots [slots][max_length / 16][kv_heads]: tiles of 16 positions, keys
// [head_dim][16] and values [16][head_dim]. So a slot's first positions are one range of memory.
struct Cache {
  void* keys = nullptr;
  void* values = nullptr;
  bool half = false;  // float16, else float32
  size_t max_length = 0;
  size_t kv_heads = 0;
  size_t head_dim = 0;

  size_t tile() const { return kTile * head_dim; }                        // numbers in a tile
  size_t slot() const { return max_length / kTile * kv_heads * tile(); }  // numbers in a slot
  size_t at(size_t slot_index, size_t position, size_t head) const {      // of the tile that has a position
    return slot_index * slot() + (position / kTile * kv_heads + head) * tile();
  }
};

struct LayerCall {
  size_t rows = 0;   // sequences, one slot each
  size_t width = 0;  // positions of a row, of which the first query_seqlens are valid
  size_t hidden = 0;
  size_t heads = 0;
  size_t mlp = 0;
  float epsilon = 0;
  float scale = 0;  // of the scores
  size_t threads = 1;
  const float* input = nullptr;  // [rows, width, hidden]
  float* output = nullptr;       // the same
  const float* attention_norm = nullptr;
  const float* mlp_norm = nullptr;
  Tiles qkv, attention_output, gate_up, down;
  const int32_t* seqlens_k = nullptr;      // [rows]: past plus valid positions, minus one
  const int32_t* query_seqlens = nullptr;  // [rows]
  const float* cos = nullptr;              // [positions, head_dim / 2]
  const float* sin = nullptr;
  Cache cache;
  // Scratch memory for all positions of the call.
  float* projected = nullptr;  // [positions, (heads + 2 * kv_heads) * head_dim]
  float* residual = nullptr;   // [positions, hidden]: the input plus attention
  float* activated = nullptr;  // [positions, mlp]
  float* attended = nullptr;   // [positions, heads * head_dim]
  // Of few rows each thread has its own: they have [threads, positions] rows then.
  // Rows that a thread takes for itself begin a group.
  Activations normed, mixed, gated;
  // Attention by chunks, for few rows: [positions, kv_heads, chunks, heads / kv_heads, a state].
  float* parts = nullptr;
  size_t chunks = 0;           // of the longest row
  float* workspace = nullptr;  // [threads, workspace_size]
  size_t workspace_size = 0;
  Phase phases[10];

  size_t positions() const { return rows * width; }
  size_t group() const { return heads / cache.kv_heads; }  // query heads of a KV head
  size_t valid(size_t row) const { return static_cast<size_t>(query_seqlens[row]); }
  size_t past(size_t row) const { return static_cast<size_t>(seqlens_k[row]) + 1 - valid(row); }
};

struct HeadCall {
  size_t rows = 0;
  size_t hidden = 0;
  float epsilon = 0;
  size_t threads = 1;
  const float* input = nullptr;        // [positions, hidden]
  const int64_t* positions = nullptr;  // [rows]
  const float* norm = nullptr;
  Tiles table;
  float* logits = nullptr;  // [rows, vocabulary]
  Activations normed;
  float* sums = nullptr;  // [rows, hidden]
  Phase phases[2];
};

// The code for one kind of processor.
struct Target {
  const char* name;
  void (*layer)(LayerCall& call, size_t thread);
  void (*head)(HeadCall& call, size_t thread);
  void (*look_up)(const Tiles& table, size_t row, float* output);
  size_t (*workspace)(const LayerCall& call);  // numbers that a thread needs for attention
  uint64_t (*peak)(uint64_t turns);            // multiplies bytes so many times; gives the multiply-adds
};

// The best for this processor, or null if it has none of the instructions that are needed.
const Target* ChooseTarget() noexcept;

}  // namespace kernels
