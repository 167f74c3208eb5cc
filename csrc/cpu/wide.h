// Mode products and Grams of modes that are too wide for a cache, on all free threads, by the same register tiles (tiles.h).
// The depth is cut into blocks, and the matrix is packed panel by panel where it is used. (MKL's sgemm runs at 92 GF/s a core
// here, the tiles at 110; and ATen has no syrk.)
//
// Inside a worker of for_each_task these loops run on the worker's own thread.
#pragma once

#include <algorithm>

#include "factor.h"
#include "parallel.h"
#include "tiles.h"

namespace soap_opt {

constexpr int64_t kDepth = 512;        // rows of a product that are multiplied at once
constexpr int64_t kWideColumns = 256;  // columns of the gradient that are packed at once: with kDepth, 512 KiB, half of L2
constexpr int64_t kWideGramRows = 512; // rows of the gradient that a Gram adds at once

inline int64_t free_threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// function(begin, end, room) over [0, n), with the thread's part of `room` [threads, room_numel]; threads: 1 or free_threads().
template <typename T, typename Function>
void parallel_with_room(int64_t n, int64_t threads, T* room, int64_t room_numel, const Function& function) {
  if (threads == 1) {
    function(0, n, room);
    return;
  }
  parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { function(begin, end, room + at::get_thread_num() * room_numel); });
}

// Elements of room for each thread: a piece of the gradient, a panel of the matrix, and a result that is not written in place.
template <typename T>
int64_t wide_room(int64_t width) {
  return kDepth * kWideColumns + kDepth * kPackedWidth<T> + (width + kPackedWidth<T>)*(kWideColumns + kPackedWidth<T>);
}

// Whether product_wide() serves a group of this width, seen as [before, width, after].
inline bool is_wide(int64_t width, int64_t before, int64_t after) {
  return width > kTileWidth && (after == 1 || before == 1 || after >= kWideColumns / 4);
}

// The number of columns that a thread takes at once, of `columns` in each slab. It is a whole number of panels, at most
// kWideColumns, and such that all threads are busy to the end (768 columns on two threads are four pieces of 192, not three
// of 256).
template <typename T>
int64_t wide_columns(int64_t columns, int64_t slabs, int64_t threads) {
  constexpr int64_t panel = kPackedWidth<T>;
  int64_t pieces = (columns + kWideColumns - 1) / kWideColumns;
  if (slabs % threads != 0) pieces = (pieces + threads - 1) / threads * threads;
  const int64_t even = (columns + pieces - 1) / pieces;
  return std::min(kWideColumns, (even + panel - 1) / panel * panel);
}

// to <- from x_g M, both [A, D, B], `to` and `from` different buffers. rooms [threads, wide_room].
template <typename T>
void product_wide(const T* from, T* to, int64_t before, int64_t after, const Factor<T>& m, int64_t threads, T* rooms,
                  int64_t room_numel) {
  constexpr int64_t panel = kPackedWidth<T>;
  const int64_t width = m.width;
  const bool rows = after == 1; // the pieces of the gradient are rows [A, D], otherwise columns of [D, B]
  const int64_t columns = rows ? before : after, slabs = rows ? 1 : before;
  const int64_t chunk = wide_columns<T>(columns, slabs, threads), chunks = (columns + chunk - 1) / chunk;
  parallel_with_room(slabs * chunks, threads, rooms, room_numel, [&](int64_t begin, int64_t end, T* room) {
    T* piece = room;                           // panels [depth, kWideColumns]
    T* matrix = piece + kDepth * kWideColumns; // one panel [depth, W]
    T* result = matrix + kDepth * panel;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t a = rows ? 0 : unit / chunks, first = (rows ? unit : unit % chunks) * chunk;
      const int64_t count = std::min(chunk, columns - first);
      const T* x = rows ? from + first * width : from + a * width * after + first;
      T* place = rows ? to + first * width : to + a * width * after + first;
      // Tiles write whole panels: in place where a row ends with a whole panel, or else into `result`
      const int64_t row = rows ? width : count;
      const bool in_place = row % panel == 0;
      T* c = in_place ? place : result;
      const int64_t ld = in_place ? (rows ? width : after) : panels_of<T>(row) * panel;
      for (int64_t k = 0; k < width; k += kDepth) {
        const int64_t depth = std::min(kDepth, width - k);
        if (rows)
          pack_transposed<T>(piece, depth, 0, x + k, width, depth, count);
        else
          pack_rows<T>(piece, depth, 0, x + k * after, after, depth, count);
        for (int64_t j = 0; j < width; j += panel) {
          const int64_t valid = std::min(panel, width - j);
          if (m.transposed)
            pack_transposed<T>(matrix, depth, 0, m.data + j * width + k, width, depth, valid);
          else
            pack_rows<T>(matrix, depth, 0, m.data + k * width + j, width, depth, valid);
          if (rows)
            multiply_panels<T>(c + j, ld, count, valid, piece, matrix, depth, k > 0);
          else
            multiply_panels<T>(c + j * ld, ld, valid, count, matrix, piece, depth, k > 0);
        }
      }
      if (!in_place) copy_runs<T>(place, rows ? width : after, result, ld, rows ? count : width, row);
    }
  });
}

// Elements of room that gram_wide needs for all threads together.
template <typename T>
int64_t wide_gram_room(int64_t width) {
  return packed_numel<T>(kWideGramRows, width);
}

// gram [D, D] <- beta gram + (1 - beta) (x [A, D, B] contracted with itself over A and B). It needs no room of gram's size.
template <typename T>
void gram_wide(T* gram, const T* x, int64_t before, int64_t width, int64_t after, T* panels, double beta) {
  constexpr int64_t panel = kPackedWidth<T>;
  const int64_t count = panels_of<T>(width);
  // A block of rows k = (a, b) has several a with all of their b, or one a with a part of its b
  const int64_t from_b = std::min(after, kWideGramRows), from_a = std::max<int64_t>(1, kWideGramRows / after);
  bool first = true;
  for (int64_t a = 0; a < before; a += from_a)
    for (int64_t b = 0; b < after; b += from_b) {
      const int64_t many = std::min(from_a, before - a), some = std::min(from_b, after - b), rows = many * some;
      parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const int64_t i = p * panel, columns = std::min(panel, width - i);
          T* to = panels + i * rows;
          if (after == 1)
            pack_rows<T>(to, rows, 0, x + a * width + i, width, rows, columns);
          else
            for (int64_t k = 0; k < many; ++k)
              pack_transposed<T>(to, rows, k * some, x + ((a + k) * width + i) * after + b, after, some, columns);
        }
      });
      const T keep = first ? T(beta) : T(1), weight = T(1 - beta);
      // A short row of tiles and a long row together, so that shares are equal
      parallel_for(0, (count + 1) / 2, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          average_gram_row<T>(gram, width, p * panel, panels, rows, keep, weight);
          if (count - 1 - p != p) average_gram_row<T>(gram, width, (count - 1 - p) * panel, panels, rows, keep, weight);
        }
      });
      first = false;
    }
  parallel_for(0, (count + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t q : {p, count - 1 - p}) {
        mirror<T>(gram, width, q * panel, std::min(width, (q + 1) * panel));
        if (count - 1 - p == p) break;
      }
  });
}

} // namespace soap_opt
