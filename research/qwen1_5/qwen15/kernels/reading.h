// How weights are asked for that few tokens meet, which are bound by the memory: processors differ in what they like.
//
// On a Xeon (Emerald Rapids) a hint of 1 reads twice as fast as none of it at one thread, and past all caches (0, which
// is none of the choices) less than half as fast; on AMD all are alike. What is best is measured on the machine
// (reading.py); no way changes a bit of any result.
#pragma once
#include <stdint.h>

namespace qwen15 {

struct Reading {
  // 0: not asked for, the hardware's prefetchers do it alone; 1: into the outer caches; 3: into all, where weights are not
  // quantised (others are asked for into the outer ones).
  int8_t hint = 1;
  int8_t places = 2;     // at which each thread reads, each in address order: 1 or 2
  int32_t ahead = 4096;  // bytes, from what is read now to what is asked for; a whole row at least
};

// The way in use. It may change between dispatches only.
Reading reading();
void set_reading(Reading way);

// A way as the loop over weights takes it.
struct Asking {
  int64_t ahead = 0;  // bytes
  bool near = false;

  inline void line(const void* at) const {
    const char* wanted = static_cast<const char*>(at) + ahead;
    if (near) __builtin_prefetch(wanted, 0, 3);
    else __builtin_prefetch(wanted, 0, 1);
  }
};

}  // namespace qwen15
