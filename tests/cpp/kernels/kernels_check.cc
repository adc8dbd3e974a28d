// Runs the CPU kernels on the cases of a file, on every instruction set to be had, and compares.
//
//   kernels_check CASES [THREADS]
//
// With THREADS, the tasks of a call run on as many threads, two callers at once. tests/cpp/test_kernels.py writes the
// file; of each case it holds the op, the descriptor, and for each pointer among the arguments, in their order, either
// nothing (null), the bytes of an input, or of an output what must come out in double precision and how far it may be
// off. Every buffer is exactly as long as it says, so that a sanitizer sees what goes past it.
//
// Exit status 0 when all values of all cases are within bounds and there was at least one.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "vim/cpu.h"

namespace {

enum Kind : int64_t { kNull = 0, kInput = 1, kOutput = 2 };

struct Argument {
  int64_t kind, bytes, io;  // io: vim_dtype of an output
  const char* data;         // of an input
  const double *want, *allowed;
  int64_t count;
};

struct Case {
  int64_t op;
  const char* desc;
  std::vector<Argument> arguments;
};

class Reader {
 public:
  explicit Reader(const std::vector<char>& bytes) : at_(bytes.data()), end_(bytes.data() + bytes.size()) {}
  bool done() const { return at_ == end_; }
  int64_t Number() {
    int64_t value;
    std::memcpy(&value, Take(sizeof value), sizeof value);
    return value;
  }
  // Pieces are padded to eight bytes.
  const char* Take(int64_t bytes) {
    const int64_t padded = (bytes + 7) / 8 * 8;
    if (bytes < 0 || padded > end_ - at_) {
      std::fprintf(stderr, "the file of cases ends too early\n");
      std::exit(2);
    }
    const char* const piece = at_;
    at_ += padded;
    return piece;
  }

 private:
  const char* at_;
  const char* end_;
};

Case ReadCase(Reader& reader) {
  Case one = {};
  one.op = reader.Number();
  one.desc = reader.Take(reader.Number());
  one.arguments.resize(reader.Number());
  for (Argument& argument : one.arguments) {
    argument.kind = reader.Number();
    if (argument.kind == kInput) {
      argument.bytes = reader.Number();
      argument.data = reader.Take(argument.bytes);
    } else if (argument.kind == kOutput) {
      argument.io = reader.Number();
      argument.count = reader.Number();
      argument.bytes = argument.count * (argument.io == VIM_F32 ? 4 : 2);
      argument.want = reinterpret_cast<const double*>(reader.Take(argument.count * 8));
      argument.allowed = reinterpret_cast<const double*>(reader.Take(argument.count * 8));
    }
  }
  return one;
}

double Value(const char* data, int64_t index, int64_t io) {
  uint32_t bits = 0;
  float value = 0;
  if (io == VIM_F32) {
    std::memcpy(&value, data + 4 * index, 4);
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, data + 2 * index, 2);
  if (io == VIM_BF16) {
    bits = static_cast<uint32_t>(half) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = (half >> 10) & 31, mantissa = half & 1023;
  const double size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + mantissa, exponent - 25)
                                     : std::ldexp(mantissa, -24);
  return half >> 15 ? -size : size;
}

void OnThreads(void* pool, void (*body)(void* context, size_t index), size_t count, void* context) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < *static_cast<int*>(pool); ++i)
    threads.emplace_back([&] {
      for (size_t index; (index = next++) < count;) body(context, index);
    });
  for (std::thread& thread : threads) thread.join();
}

vim_status Run(const char* isa, const Case& one, const void* args, int threads) {
  const vim_parallel_for pool = threads > 0 ? OnThreads : nullptr;
  switch (one.op) {
    case 0:
      return vim_selective_scan_cpu_isa(isa, reinterpret_cast<const vim_selective_scan_desc*>(one.desc),
                                        static_cast<const vim_selective_scan_args*>(args), pool, &threads);
    case 1:
      return vim_bi_selective_scan_cpu_isa(isa, reinterpret_cast<const vim_bi_selective_scan_desc*>(one.desc),
                                           static_cast<const vim_bi_selective_scan_args*>(args), pool, &threads);
    case 2:
      return vim_bi_causal_conv1d_cpu_isa(isa, reinterpret_cast<const vim_bi_causal_conv1d_desc*>(one.desc),
                                          static_cast<const vim_bi_causal_conv1d_args*>(args), pool, &threads);
    case 3:
      return vim_add_rms_norm_cpu_isa(isa, reinterpret_cast<const vim_add_rms_norm_desc*>(one.desc),
                                      static_cast<const vim_add_rms_norm_args*>(args), pool, &threads);
    default:
      return VIM_UNSUPPORTED;
  }
}

std::atomic<long> compared{0}, failures{0};

void Fail(const char* isa, size_t index, const std::string& what) {
  if (failures++ < 20) std::printf("FAIL %s, case %zu: %s\n", isa, index, what.c_str());
}

void Check(const char* isa, const Case& one, size_t index, int threads) {
  // Every argument is a pointer, so the struct is an array of them.
  std::vector<void*> args;
  std::vector<std::unique_ptr<char[]>> buffers;
  for (const Argument& argument : one.arguments) {
    if (argument.kind == kNull) {
      args.push_back(nullptr);
      continue;
    }
    buffers.emplace_back(new char[argument.bytes]);
    if (argument.kind == kInput)
      std::memcpy(buffers.back().get(), argument.data, argument.bytes);
    else
      std::memset(buffers.back().get(), 0xff, argument.bytes);  // NaN in every type
    args.push_back(buffers.back().get());
  }
  const vim_status status = Run(isa, one, args.data(), threads);
  if (status != VIM_OK) return Fail(isa, index, "status " + std::to_string(status));
  for (size_t i = 0; i < one.arguments.size(); ++i) {
    const Argument& argument = one.arguments[i];
    if (argument.kind != kOutput) continue;
    for (int64_t k = 0; k < argument.count; ++k) {
      const double got = Value(static_cast<const char*>(args[i]), k, argument.io);
      const double want = argument.want[k];
      const bool same = std::isnan(want) ? std::isnan(got) : std::fabs(got - want) <= argument.allowed[k];
      ++compared;
      if (!same) {
        Fail(isa, index,
             "argument " + std::to_string(i) + " at " + std::to_string(k) + " is " + std::to_string(got) +
                 " instead of " + std::to_string(want));
        break;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: kernels_check CASES [THREADS]\n");
    return 2;
  }
  std::FILE* const file = std::fopen(argv[1], "rb");
  if (file == nullptr) {
    std::perror(argv[1]);
    return 2;
  }
  std::vector<char> bytes;
  char piece[1 << 16];
  for (size_t got; (got = std::fread(piece, 1, sizeof piece, file)) > 0;) bytes.insert(bytes.end(), piece, piece + got);
  std::fclose(file);
  const int threads = argc > 2 ? std::atoi(argv[2]) : 0;

  std::vector<Case> cases;
  for (Reader reader(bytes); !reader.done();) cases.push_back(ReadCase(reader));
  for (size_t i = 0; vim_cpu_isa_at(i) != nullptr; ++i) {
    const char* const isa = vim_cpu_isa_at(i);
    const auto all = [&] {
      for (size_t k = 0; k < cases.size(); ++k) Check(isa, cases[k], k, threads);
    };
    if (threads > 0) {
      std::thread other(all);
      all();
      other.join();
    } else {
      all();
    }
    std::printf("isa %s\n", isa);
  }
  std::printf("%zu cases, %ld values compared, %ld failures\n", cases.size(), compared.load(), failures.load());
  return failures.load() == 0 && compared.load() > 0 ? 0 : 1;
}
