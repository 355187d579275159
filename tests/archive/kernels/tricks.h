// Softmax of rows for tests of `fastshard archive verify`, with the tricks of an evolved kernel: the
// second argument picks one, so that a single build holds them all. A source is this file, then
// softmax.cpp or softmax.cu, then forward.cpp, joined as one text, as the archive has it.
#include <pybind11/eval.h>
#include <torch/extension.h>

#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <thread>
#include <tuple>
#include <vector>

namespace {

enum Trick : int64_t {
  kRight, kWrong, kUnwritten, kPastTheEnd, kBeforeTheStart, kEditsInput, kOneShape, kRefusesShapes,
  kHangs, kAlias, kStaticOutput, kCachesByPointer, kCachesByCorners, kDetectsPoison, kOverflows,
  kInaccurate, kCrashes, kHogsMemory, kLate, kPatchesTorch, kOnes, kLazy, kForks, kSpoilsFree,
  kEarly, kFaults,  // in CUDA alone
};

}  // namespace
