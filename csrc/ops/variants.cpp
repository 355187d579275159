// The table of variants in use, looked up by device, op, dtype and shape.
#include "ops/variants.h"

#include <bit>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
#include <vector>

#include "common/check.h"

namespace fastshard {
namespace {

struct Entry {
  std::string device, key, variant;  // key: op, dtype and shape as in a line of the table
};

using Choices = std::unordered_map<std::string, std::string>;  // key -> variant

std::mutex mutex;
std::vector<Entry> entries;
std::map<int, std::shared_ptr<const Choices>> choices_of_devices;  // made from entries when first asked for

std::shared_ptr<const Choices> choices_of_current_device() {
  const std::lock_guard lock(mutex);
  static const auto none = std::make_shared<const Choices>();
  if (entries.empty()) return none;  // without a call to the driver
  int device = 0;
  FS_CUDA_CHECK(cudaGetDevice(&device));
  std::shared_ptr<const Choices>& choices = choices_of_devices[device];
  if (choices == nullptr) {
    cudaDeviceProp properties;
    FS_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    const std::string capability = std::to_string(properties.major) + "." + std::to_string(properties.minor);
    const auto made = std::make_shared<Choices>();
    for (const Entry& entry : entries) {
      if (entry.device == properties.name || entry.device == capability) (*made)[entry.key] = entry.variant;
    }
    choices = made;
  }
  return choices;
}

}  // namespace

const char* name_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:    return "float32";
    case ScalarType::Half:     return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    default:                   return "";
  }
}

void use_variants(const std::string& table) {
  std::vector<Entry> read;
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find('\t'), last = line.rfind('\t');
    if (first == std::string::npos || first == last) throw std::runtime_error("not an entry of a table: " + line);
    read.push_back({line.substr(0, first), line.substr(first + 1, last - first - 1), line.substr(last + 1)});
  }
  const std::lock_guard lock(mutex);
  entries = std::move(read);
  choices_of_devices.clear();
}

std::string variant_for(const std::string& asked, const char* op, ScalarType dtype,
                        std::initializer_list<int64_t> counts, std::initializer_list<int64_t> sizes) {
  if (asked != "auto") return asked;
  const auto choices = choices_of_current_device();
  if (choices->empty()) return asked;
  std::string key = std::string(op) + '\t' + name_of(dtype) + '\t';
  for (const int64_t count : counts) key += std::to_string(std::bit_ceil(uint64_t(count))) + ',';
  for (const int64_t size : sizes) key += std::to_string(size) + ',';
  key.pop_back();
  const auto found = choices->find(key);
  return found == choices->end() ? asked : found->second;
}

}  // namespace fastshard

#ifdef FS_EMULATOR
extern "C" __attribute__((visibility("default"))) void fastshard_emulator_use_variants(const char* table) {
  fastshard::use_variants(table);
}
#endif
