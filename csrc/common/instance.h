// A launcher in a library of its own: how `fastshard tune --patch` tries variants that are not in the menus.
//
// fastshard/tune/instances.py writes a source of a few lines that ends in FS_INSTANCE; csrc/ops/instances.h finds the
// launcher by the name of the variant.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <exception>
#include <string>

// params: of the type that the kernel's host interface takes. Returns what failed, valid until this thread's next call;
// null where nothing did. No exception leaves the library.
extern "C" typedef const char* (*FastshardInstance)(const void* params, cudaStream_t stream);

// launch: void(const Params&, cudaStream_t).
#define FS_INSTANCE(Params, launch)                                                                                  \
  extern "C" {                                                                                                       \
  __attribute__((visibility("default"))) extern const size_t fastshard_params_bytes = sizeof(Params);                \
  __attribute__((visibility("default"))) const char* fastshard_instance(const void* params, cudaStream_t stream) {   \
    static thread_local std::string failure;                                                                         \
    try {                                                                                                            \
      launch(*static_cast<const Params*>(params), stream);                                                           \
      return nullptr;                                                                                                \
    } catch (const std::exception& error) {                                                                          \
      failure = error.what();                                                                                        \
      return failure.c_str();                                                                                        \
    }                                                                                                                \
  }                                                                                                                  \
  }                                                                                                                  \
  static_assert(true)
