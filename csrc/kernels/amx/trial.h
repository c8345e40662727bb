// Whether tile instructions work here, found by running one.
#pragma once

namespace chatglm::amx {

// Multiplies two tiles of ones. Call only after the processor's flags and the system's permission: elsewhere the
// instruction is illegal.
bool one_tile_trial();

}  // namespace chatglm::amx
