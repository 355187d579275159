// Twin of csrc/common/launch.cuh: the same functions on the SIMT machine. See simt.h.
#pragma once
#include <tuple>

#include "common/check.h"
#include "simt.h"

#define FS_SHARED_STORAGE(SharedStorage, name) \
  SharedStorage& name =                        \
      *static_cast<SharedStorage*>(::fastshard::simt::shared_storage(sizeof(SharedStorage), alignof(SharedStorage)))
#define FS_EXTRA_SHARED_BYTES(bytes) static_assert(bytes > 0)

namespace fastshard {

constexpr int kMaxSharedBytes = 101376;  // a block on compute capability 8.6

template <typename SharedStorage>
constexpr int shared_bytes() {
  if constexpr (std::is_void_v<SharedStorage>) {
    return 0;
  } else {
    static_assert(sizeof(SharedStorage) <= kMaxSharedBytes, "more shared memory than a block has");
    return static_cast<int>(sizeof(SharedStorage));
  }
}

namespace launch_detail {

// The emulated device has no kernel names; the SharedStorage that the compiler writes here tells kernels apart.
template <typename SharedStorage, typename... KernelArgs>
void launch(void (*kernel)(KernelArgs...), dim3 grid, int threads, int extra_bytes, bool cooperative,
            const KernelArgs&... args) {
  struct Call {
    void (*kernel)(KernelArgs...);
    std::tuple<KernelArgs...> args;
  };
  const Call call{kernel, {args...}};
  simt::run({grid, threads, shared_bytes<SharedStorage>() + extra_bytes, cooperative, __PRETTY_FUNCTION__},
            [](const void* argument) {
              const Call& c = *static_cast<const Call*>(argument);
              std::apply(c.kernel, c.args);
            },
            &call);
}

}  // namespace launch_detail

template <typename SharedStorage, typename... KernelArgs>
void launch_kernel(void (*kernel)(KernelArgs...), dim3 grid, int threads, cudaStream_t stream,
                   const std::type_identity_t<KernelArgs>&... args) {
  (void)stream;
  launch_detail::launch<SharedStorage, KernelArgs...>(kernel, grid, threads, 0, false, args...);
}

template <typename SharedStorage, typename... KernelArgs>
bool launch_cooperative_kernel(void (*kernel)(KernelArgs...), dim3 grid, int threads, int extra_bytes,
                               cudaStream_t stream, const std::type_identity_t<KernelArgs>&... args) {
  (void)stream;
  launch_detail::launch<SharedStorage, KernelArgs...>(kernel, grid, threads, extra_bytes, true, args...);
  return true;
}

template <typename SharedStorage, typename... KernelArgs>
int max_resident_blocks(void (*kernel)(KernelArgs...), int threads, int extra_bytes = 0) {
  (void)kernel;
  return simt::num_sms() * simt::max_blocks_per_sm(threads, shared_bytes<SharedStorage>() + extra_bytes);
}

inline bool supports_cooperative_launch() { return simt::supports_cooperative_launch(); }

}  // namespace fastshard
