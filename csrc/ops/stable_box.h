// FS_IMPL: register a C++ function for an op, with its argument types checked.
//
// The stable ABI moves every argument through a 64-bit StableIValue and never compares the C++ type with the schema:
// a `float` for a schema's `float` reads 1.5 as 0.0, an `int` reads garbage. So only the types below compile.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace fastshard {

template <class T> struct IsStableArgument : std::false_type {};
template <> struct IsStableArgument<torch::stable::Tensor> : std::true_type {};
template <> struct IsStableArgument<int64_t> : std::true_type {};
template <> struct IsStableArgument<double> : std::true_type {};
template <> struct IsStableArgument<bool> : std::true_type {};
template <> struct IsStableArgument<std::string> : std::true_type {};
template <class T> struct IsStableArgument<std::optional<T>> : IsStableArgument<T> {};
template <class T> struct IsStableArgument<std::vector<T>> : IsStableArgument<T> {};

template <class R, class... Args>
constexpr bool has_stable_arguments(R (*)(Args...)) {
  return (IsStableArgument<std::remove_cvref_t<Args>>::value && ...);
}

}  // namespace fastshard

#define FS_IMPL(library, name, function)                                                        \
  do {                                                                                          \
    static_assert(::fastshard::has_stable_arguments(&function),                                 \
                  name ": arguments must be Tensor, int64_t, double, bool, string or optionals of them"); \
    (library).impl(name, TORCH_BOX(&function));                                                 \
  } while (0)
