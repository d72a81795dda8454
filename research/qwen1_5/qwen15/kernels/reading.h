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
  int32_t ahead = 4096;  // bytes, from what is read now to what is asked for, where one group of tokens meets the rows
};

// The way in use. It may change between dispatches only.
Reading reading();
void set_reading(Reading way);

// What a loop over rows of weights asks for meanwhile: as many rows of the same form, at each place. Where `groups` of
// tokens meet the same rows one after another, each asks for its part of them: every line once, at an even pace.
struct Asking {
  const char* next[2] = {nullptr, nullptr};  // of each place; what is read itself where nothing is to be asked for
  int64_t stride = 0, bytes = 0;             // from row to row, and of a row
  int64_t groups = 1, met = 0;               // rows that the groups before this one have met, all together
  bool near = false;

  // Where asking begins with row r of this group, and how far it goes on with every 64 bytes that are read.
  const char* begin(int place, int64_t r) const {
    const int64_t parts = met + r;
    return next[place] + parts / groups * stride + parts % groups * (bytes / groups);
  }
  int64_t step() const { return (64 + groups - 1) / groups; }
  void line(const char* wanted) const {
    if (near) __builtin_prefetch(wanted, 0, 3);
    else __builtin_prefetch(wanted, 0, 1);
  }
};

}  // namespace qwen15
