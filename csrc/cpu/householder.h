// Q of a QR decomposition on one core: Householder reflections in panels, the products behind them by register tiles.
//
// LAPACK's geqrf and orgqr run at 18 GF/s for 128 x 128 and at 30 for 192 x 192 on a core whose tiles run at 117.
#pragma once

#include <cstdint>
#include <limits>

namespace soap_opt {

// Squared norms below this have lost terms to underflow.
template <typename T>
constexpr T kTinySquare = std::numeric_limits<T>::min() / (std::numeric_limits<T>::epsilon() * std::numeric_limits<T>::epsilon());

// q [d, d] row-major <- Q of a = Q R. columns [d, d] holds a by columns (row j is column j) and is overwritten; its entries are
// scaled so that squares of the largest do not overflow. columns and q have kPanel elements to spare behind their end.
template <typename T>
void householder_q(T* columns, T* q, int64_t d);

} // namespace soap_opt
