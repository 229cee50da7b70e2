// Memory for packed weights: bump-allocated from blocks of huge pages, since a decode step streams all of
// it and 4 KiB pages cost translations. A block is unmapped when the last weight in it is freed.
#include <pthread.h>
#include <sys/mman.h>

#include <new>

#include "xllm/pack.h"

namespace xn {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kBlock = size_t{32} << 20;
constexpr size_t kLine = 64;

struct Block {
    uint8_t* start;  // of the whole mapping
    size_t mapped;
    uint8_t* next;
    uint8_t* end;
    int64_t weights;
    Block* older;
};

pthread_mutex_t g_mutex = PTHREAD_MUTEX_INITIALIZER;
Block* g_blocks = nullptr;

Block* map_block(size_t bytes) {
    const size_t wanted = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const size_t mapped = wanted + kHugePage;  // room to align
    void* start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED) return nullptr;
    Block* block = new (std::nothrow) Block;
    if (block == nullptr) {
        munmap(start, mapped);
        return nullptr;
    }
    const uintptr_t aligned = (reinterpret_cast<uintptr_t>(start) + kHugePage - 1) & ~(kHugePage - 1);
    madvise(reinterpret_cast<void*>(aligned), wanted, MADV_HUGEPAGE);
    auto* first = reinterpret_cast<uint8_t*>(aligned);
    *block = Block{static_cast<uint8_t*>(start), mapped, first, first + wanted, 0, g_blocks};
    g_blocks = block;
    return block;
}

void* take(size_t bytes) {
    const size_t size = (bytes + kLine - 1) / kLine * kLine;
    Block* block = g_blocks;
    while (block != nullptr && static_cast<size_t>(block->end - block->next) < size) block = block->older;
    if (block == nullptr) block = map_block(size > kBlock ? size : kBlock);
    if (block == nullptr) return nullptr;
    uint8_t* memory = block->next;
    block->next += size;
    ++block->weights;
    return memory;
}

void give_back(void* memory) {
    for (Block** link = &g_blocks; *link != nullptr; link = &(*link)->older) {
        Block* block = *link;
        if (memory < block->start || memory >= block->end) continue;
        if (--block->weights > 0) return;
        *link = block->older;
        munmap(block->start, block->mapped);
        delete block;
        return;
    }
}

}  // namespace

void* weight_memory(size_t bytes) {
    pthread_mutex_lock(&g_mutex);
    void* memory = take(bytes);
    pthread_mutex_unlock(&g_mutex);
    return memory;
}

void free_weight_memory(void* memory) {
    if (memory == nullptr) return;
    pthread_mutex_lock(&g_mutex);
    give_back(memory);
    pthread_mutex_unlock(&g_mutex);
}

}  // namespace xn
