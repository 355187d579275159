// Launchers of variants that are not in the menus: compiled, loaded and added by `fastshard tune --patch`, or kernels that
// `fastshard archive promote` keeps, which are loaded when a call first asks for them.
#pragma once
#include <string>

#include "common/instance.h"
#include "ops/check.h"

namespace fastshard {

// From now on `op` runs this where it is asked for the variant with tensors of the dtype, like "bfloat16".
// params_bytes: size of what the launcher takes.
void add_instance(const std::string& op, const std::string& dtype, const std::string& variant, size_t params_bytes,
                  FastshardInstance launch);

// Is told of the first call of an op that asks for a promoted kernel which nobody added; may call add_instance.
extern "C" typedef void (*FastshardInstanceLoader)(const char* op, const char* dtype, const char* variant);

// From now on this loader; null for none.
void use_instance_loader(FastshardInstanceLoader loader);

// Whether a variant names a promoted kernel: PREFIX in fastshard/ops/promoted.py.
inline bool is_promoted(const std::string& variant) { return variant.starts_with("promoted_"); }

struct Instance {
  FastshardInstance launch = nullptr;
  size_t params_bytes = 0;

  explicit operator bool() const { return launch != nullptr; }

  // Throws std::runtime_error where it fails, or was compiled for other Params.
  template <typename Params>
  void run(const Params& params, cudaStream_t stream) const {
    run(&params, sizeof(Params), stream);
  }

 private:
  void run(const void* params, size_t bytes, cudaStream_t stream) const;
};

// What was added, or nothing. A promoted kernel is loaded first, once: one that cannot be loaded is nothing from then on.
Instance find_instance(const std::string& op, ScalarType dtype, const std::string& variant);

}  // namespace fastshard
