// Values of the attributes in a Metal kernel's signature.
#pragma once
#include "metal.h"

#define ZS_ATTRIBUTE(T, NAME, E) ZS_RAW inline T zs_##NAME(const ZsThread& t) { return E; }
inline uint3 zs_uint3(const ZsDim& d) { return uint3(d.x, d.y, d.z); }

ZS_ATTRIBUTE(uint3, thread_position_in_grid,
             uint3(t.group.x * t.nominal_size.x + t.local.x, t.group.y * t.nominal_size.y + t.local.y,
                   t.group.z * t.nominal_size.z + t.local.z))
ZS_ATTRIBUTE(uint3, thread_position_in_threadgroup, zs_uint3(t.local))
ZS_ATTRIBUTE(uint3, threadgroup_position_in_grid, zs_uint3(t.group))
ZS_ATTRIBUTE(uint3, threads_per_threadgroup, zs_uint3(t.group_size))
ZS_ATTRIBUTE(uint3, dispatch_threads_per_threadgroup, zs_uint3(t.nominal_size))
ZS_ATTRIBUTE(uint3, threads_per_grid, zs_uint3(t.grid))
ZS_ATTRIBUTE(uint3, grid_size, zs_uint3(t.grid))
ZS_ATTRIBUTE(uint3, grid_origin, uint3(0, 0, 0))
ZS_ATTRIBUTE(uint3, threadgroups_per_grid, zs_uint3(t.groups))
ZS_ATTRIBUTE(uint, thread_index_in_threadgroup, t.index)
ZS_ATTRIBUTE(uint, thread_index_in_simdgroup, t.lane)
ZS_ATTRIBUTE(uint, simdgroup_index_in_threadgroup, t.simd)
ZS_ATTRIBUTE(uint, simdgroups_per_threadgroup, t.simds)
ZS_ATTRIBUTE(uint, threads_per_simdgroup, 32)
ZS_ATTRIBUTE(uint, thread_execution_width, 32)
ZS_ATTRIBUTE(uint, thread_index_in_quadgroup, t.index % 4)
ZS_ATTRIBUTE(uint, quadgroup_index_in_threadgroup, t.index / 4)
ZS_ATTRIBUTE(uint, quadgroups_per_threadgroup, (t.group_size.x * t.group_size.y * t.group_size.z + 3) / 4)
ZS_ATTRIBUTE(uint, dispatch_simdgroups_per_threadgroup,
             (t.nominal_size.x * t.nominal_size.y * t.nominal_size.z + 31) / 32)
ZS_ATTRIBUTE(uint, dispatch_quadgroups_per_threadgroup,
             (t.nominal_size.x * t.nominal_size.y * t.nominal_size.z + 3) / 4)
