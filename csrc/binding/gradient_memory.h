// Memory for gradients on the CPU. The first touch of some hundred megabytes takes longer than the
// arithmetic, and torch's allocator returns each block to the system. So the memory of the last
// large gradient that was freed is kept for the next one.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "layout.h"

// From torch 2.11 on: null with torch 2.10.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fused_xent::binding {

constexpr int64_t kLeastKept = 4 << 20;  // bytes; malloc reuses smaller blocks

// Asks for 2 MiB pages in fresh memory; whether they are given is the kernel's business.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

struct Block {
  static constexpr std::align_val_t kAlignment{64};  // as torch's
  const int64_t bytes;
  void* const data = ::operator new(bytes, kAlignment);

  explicit Block(int64_t bytes_) : bytes(bytes_) { advise_huge_pages(data, bytes); }
  Block(const Block&) = delete;
  ~Block() { ::operator delete(data, kAlignment); }
};

// At most one block, which no tensor uses. It is only ever exchanged, so no thread sees a block
// that another one has. Never destroyed: tensors may be freed at exit.
inline std::atomic<Block*> kept_block{nullptr};

// Returns how many bytes were kept.
inline int64_t empty_cache() {
  const std::unique_ptr<Block> block(kept_block.exchange(nullptr));
  return block ? block->bytes : 0;
}

inline bool keeps_gradients() {
  static const bool keeps = [] {
    const char* choice = std::getenv("FUSED_XENT_KEEP_GRADIENT");
    if (torch_from_blob == nullptr || (choice != nullptr && std::string(choice) == "0"))
      return false;
#if defined(__unix__) || defined(__APPLE__)
    // After a fork, the first write to each page would copy it.
    pthread_atfork([] { empty_cache(); }, nullptr, nullptr);
#endif
    return true;
  }();
  return keeps;
}

// The kept block, if it is large enough, but not more than twice as large as needed.
inline std::unique_ptr<Block> take_block(int64_t bytes) {
  std::unique_ptr<Block> block(kept_block.exchange(nullptr));
  if (block && bytes <= block->bytes && block->bytes / 2 <= bytes) return block;
  block.reset();  // before the next one is allocated
  return std::make_unique<Block>(bytes);
}

// A tensor of the same layout on the meta device. An empty one on the CPU would be filled, and so
// touched, under torch.use_deterministic_algorithms.
inline Tensor without_memory(const Tensor& like) {
  return empty_strided(like.sizes(), like.strides(), like.scalar_type(),
                       aoti_torch_device_type_meta(), -1);
}

// Unwritten memory like a contiguous or permuted tensor's, on the CPU. Frees into kept_block.
inline Tensor on_kept_memory(const Tensor& like) {
  std::unique_ptr<Block> block = take_block(like.numel() * like.element_size());
  const auto keep = [](void*, void* context) {
    const std::unique_ptr<Block> before(kept_block.exchange(static_cast<Block*>(context)));
  };
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      torch_from_blob(block->data, like.dim(), like.sizes().data(), like.strides().data(), 0,
                      dtype_code(like.scalar_type()), aoti_torch_device_type_cpu(), -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, keep, block.get()));
  block.release();
  return Tensor(handle);
}

}  // namespace fused_xent::binding
