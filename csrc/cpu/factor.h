// The matrix of a group of modes, and the panels that it is packed into.
#pragma once

#include "products.h"
#include "tiles.h"

namespace soap_opt {

// A matrix up to this width is packed once, for all of its products; a wider matrix is packed panel by panel (wide.h).
constexpr int64_t kTileWidth = 512;

// The matrix of the product x_g M: a group's M [D, D], or M^T.
template <typename T>
struct Factor {
  const T* data = nullptr;
  int64_t width = 0;
  bool transposed = false;
  const T* packed = nullptr; // the panels of M (or M^T), once pack() was called

  int64_t row_stride() const { return transposed ? 1 : width; }
  int64_t column_stride() const { return transposed ? width : 1; }
  Matrix<const T> matrix() const { return {data, width, width, row_stride(), column_stride()}; }
  void pack(T* room) {
    if (transposed)
      pack_transposed<T>(room, width, 0, data, width, width, width);
    else
      pack_rows<T>(room, width, 0, data, width, width, width);
    packed = room;
  }
};

} // namespace soap_opt
