#pragma once

#include <cstdint>

#include "mage/token_mass.h"

// How token_mass cuts rows and tokens on a GPU.
//
// A stream is a request's KV head, in tiles of 64 tokens. Workers (CTAs) take as many of all tiles in a row, or one
// more. A worker goes through its tiles once per chunk of rows. Where rows have to be added up over tokens first (norm
// prefix), a worker's part of a stream leaves them in slot stream + worker: from one part to the next at least one of
// the two grows, so no two parts share a slot.
namespace mage::core {

constexpr int32_t kMassTile = 64;

// Rows that the kernel's instances hold at once.
constexpr int32_t kMassShapes[] = {64, 128, 192, 224, 256};
constexpr int kNumMassShapes = 5;

struct TokenMassPlan {
    int64_t rows = 0;        // R
    int64_t chunks = 0;      // of rows, as few as fit
    int64_t chunk_rows = 0;  // a multiple of 8
    int shape = 0;           // of kMassShapes, the smallest that holds a chunk
    int64_t list_tiles = 0;  // of a stream that is a list of candidates
    int64_t max_tiles = 0;   // of all streams over [0, max_seq_len)

    // Workspace of norm prefix: rows of sums per slot, and two numbers per stream.
    int64_t padded_rows = 0;
    int64_t slots = 0;
};

TokenMassPlan plan_token_mass(const TokenMassParams& params);

}  // namespace mage::core
