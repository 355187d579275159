// The variants that were added to those of the menus.
#include "ops/instances.h"

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "ops/variants.h"

namespace fastshard {
namespace {

std::mutex mutex;
std::map<std::tuple<std::string, std::string, std::string>, Instance> instances;  // by op, dtype and variant
FastshardInstanceLoader loader = nullptr;

}  // namespace

void add_instance(const std::string& op, const std::string& dtype, const std::string& variant, size_t params_bytes,
                  FastshardInstance launch) {
  const std::lock_guard lock(mutex);
  instances[{op, dtype, variant}] = {launch, params_bytes};
}

void use_instance_loader(FastshardInstanceLoader given) {
  const std::lock_guard lock(mutex);
  loader = given;
}

Instance find_instance(const std::string& op, ScalarType dtype, const std::string& variant) {
  FastshardInstanceLoader asked = nullptr;
  const bool may_load = is_promoted(variant);
  const auto key = [&] { return std::tuple(op, std::string(name_of(dtype)), variant); };
  {
    const std::lock_guard lock(mutex);
    if (instances.empty() && !may_load) return {};
    if (const auto found = instances.find(key()); found != instances.end()) return found->second;
    if (loader == nullptr || !may_load) return {};
    instances[key()] = {};  // once; calls of other threads meanwhile go on without it
    asked = loader;
  }
  asked(op.c_str(), name_of(dtype), variant.c_str());  // unlocked: it adds what it loads
  const std::lock_guard lock(mutex);
  return instances[key()];
}

void Instance::run(const void* params, size_t bytes, cudaStream_t stream) const {
  if (bytes != params_bytes) {
    throw std::runtime_error("an instance takes " + std::to_string(params_bytes) +
                             " bytes of parameters, this build has " + std::to_string(bytes) +
                             ": it was compiled from another csrc");
  }
  if (const char* failure = launch(params, stream)) throw std::runtime_error(failure);
}

}  // namespace fastshard

#ifdef FS_EMULATOR
extern "C" __attribute__((visibility("default"))) void fastshard_emulator_add_instance(
    const char* op, const char* dtype, const char* variant, size_t params_bytes, FastshardInstance launch) {
  fastshard::add_instance(op, dtype, variant, params_bytes, launch);
}

extern "C" __attribute__((visibility("default"))) void fastshard_emulator_use_instance_loader(
    fastshard::FastshardInstanceLoader loader) {
  fastshard::use_instance_loader(loader);
}
#endif
