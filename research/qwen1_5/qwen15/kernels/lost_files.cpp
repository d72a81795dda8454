// SIGBUS while a mapped file is read: one line that names the file, and exit code 1.
//
// Weights are mapped, not copied. When their file becomes shorter or its disk fails, the next look at a page that is
// not in memory is a signal to the thread that looks, which nothing can mend: the numbers are gone. The handler calls
// only what POSIX calls async-signal-safe. What it finds no mapped file for goes to whoever had the signal before.
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include <atomic>

#define QWEN15_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kLine = 4096 + 256;  // of /proc/self/maps: a path of PATH_MAX bytes and what stands before it
constexpr int kNameBytes = 300;    // of a path that are shown, so that a line stays one
constexpr int kExitFailed = 1;
constexpr char kBegin[] = "error: ";
constexpr char kEnd[] =
    ": became shorter, or its disk cannot be read any more, while it was in use. "
    "To replace a file write the new one beside it and rename it; otherwise look at the disk.\n";

struct sigaction before;
std::atomic<bool> telling{false};
char line[kLine];
char chunk[4096];

// Digits of base 16 from *text on, which moves behind them.
uintptr_t hexadecimal(const char** text) {
  uintptr_t value = 0;
  for (;; ++*text) {
    char c = **text;
    int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return value;
    value = value * 16 + digit;
  }
}

// The path in a line "begin-end rights offset device inode   path" when the address is in its range; else null.
const char* path_if_holds(const char* text, uintptr_t address) {
  uintptr_t begin = hexadecimal(&text);
  if (*text++ != '-') return nullptr;
  uintptr_t end = hexadecimal(&text);
  return begin <= address && address < end ? strchr(text, '/') : nullptr;
}

// The path of the mapped file that an address belongs to, null when it belongs to none.
const char* file_at(uintptr_t address) {
  int maps = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
  if (maps < 0) return nullptr;
  const char* path = nullptr;
  int length = 0;
  for (ssize_t got; path == nullptr && (got = read(maps, chunk, sizeof chunk)) > 0;) {
    for (ssize_t i = 0; i < got && path == nullptr; ++i) {
      if (chunk[i] != '\n') {
        if (length < kLine - 1) line[length++] = chunk[i];
        continue;
      }
      line[length] = 0;
      path = path_if_holds(line, address);
      length = 0;
    }
  }
  close(maps);
  return path;
}

bool continues(char c) { return (c & '\xC0') == '\x80'; }

// Copies the end of a path, without what a terminal would obey: control characters, those of C1 and those that turn the
// direction of writing (U+0080 to U+009F, U+2000 to U+207F). Returns the bytes written.
int shown(const char* path, char* out) {
  size_t size = strlen(path);
  if (size > kNameBytes) {
    path += size - kNameBytes;
    while (continues(*path)) ++path;
  }
  int count = 0;
  while (*path) {
    unsigned char c = path[0], next = path[1];
    int odd = c < 0x20 || c == 0x7F ? 1 : c == 0xC2 && next >= 0x80 && next < 0xA0 ? 2 :
              c == 0xE2 && (next == 0x80 || next == 0x81) && continues(path[2]) ? 3 : 0;
    out[count++] = odd ? '?' : *path;
    path += odd ? odd : 1;
  }
  return count;
}

// The signal goes to whoever had it before us.
void pass_on(int number, siginfo_t* info, void* context) {
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler == SIG_IGN && info->si_code <= 0) {
    return;  // sent by a program, and ignored
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    signal(number, SIG_DFL);
    raise(number);  // comes when this handler has returned
  } else {
    before.sa_handler(number);
  }
}

void lost(int number, siginfo_t* info, void* context) {
  while (telling.exchange(true)) usleep(1000);  // another thread met a hole first, and is about to end the process
  const char* path = info->si_code > 0 ? file_at(reinterpret_cast<uintptr_t>(info->si_addr)) : nullptr;
  if (path == nullptr) {
    telling = false;
    pass_on(number, info, context);
    return;
  }
  char text[sizeof kBegin + kNameBytes + sizeof kEnd];
  int size = sizeof kBegin - 1;
  memcpy(text, kBegin, size);
  size += shown(path, text + size);
  memcpy(text + size, kEnd, sizeof kEnd - 1);
  size += sizeof kEnd - 1;
  ssize_t written = write(STDERR_FILENO, text, size);
  (void)written;  // it ends in the same way when nobody can be told
  _exit(kExitFailed);
}

}  // namespace

// From now on a mapped file that is lost ends this process with a line that names it and exit code 1. For programs that
// are commands: whoever else loads the library decides about signals itself. More calls than one do nothing.
QWEN15_API void qwen15_tell_of_lost_files() {
  static std::atomic<bool> installed{false};
  if (installed.exchange(true)) return;
  struct sigaction action = {};
  action.sa_sigaction = lost;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, &before);
}
