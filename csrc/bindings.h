// Parts of the Python module, one file each in bindings/.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace chatglm {

template <typename T, size_t kDims>
using Array = nanobind::ndarray<const T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;
template <typename T, size_t kDims>
using MutableArray = nanobind::ndarray<T, nanobind::ndim<kDims>, nanobind::c_contig, nanobind::device::cpu>;

void bind_attention(nanobind::module_& module);
void bind_isa(nanobind::module_& module);
void bind_limit(nanobind::module_& module);
void bind_packing(nanobind::module_& module);
void bind_team(nanobind::module_& module);
void bind_tiles(nanobind::module_& module);
void bind_fully_connected(nanobind::module_& module);

}  // namespace chatglm
