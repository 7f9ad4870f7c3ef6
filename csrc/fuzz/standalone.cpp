// A driver for compilers without libFuzzer: random and mutated inputs from a seed, without its
// coverage. Takes the same options (-runs=N, -seed=S, -max_len=L) or files to run again.
#include <sanitizer/common_interface_defs.h>

#include <array>
#include <csignal>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>

#include "input.hpp"

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes current;

void keep_current() {
    std::ofstream("crash-input", std::ios::binary)
        .write(reinterpret_cast<const char*>(current.data()),
               static_cast<std::streamsize>(current.size()));
    std::fprintf(stderr, "the input is in ./crash-input: give that file to this program\n");
}

void run(const Bytes& bytes) {
    current = bytes;
    LLVMFuzzerTestOneInput(current.data(), current.size());
}

class Generator {
  public:
    Generator(std::uint64_t seed, std::size_t max_size) : random_(seed), max_size_(max_size) {}

    const Bytes& next() {
        auto& slot = pool_[below(pool_.size())];
        if (slot.empty() || below(4) == 0) {
            slot.resize(
                below(1 + (below(8) == 0 ? max_size_ : std::min<std::size_t>(max_size_, 64))));
            for (auto& byte : slot) byte = any_byte();
        } else {
            slot = pool_[below(pool_.size())];
            for (auto changes = 1 + below(4); changes > 0; --changes) mutate(slot);
        }
        return slot;
    }

  private:
    std::size_t below(std::size_t limit) { return random_() % limit; }
    std::uint8_t any_byte() {
        constexpr std::array<std::uint8_t, 4> edges{0, 1, 127, 255};
        return below(4) == 0 ? edges[below(edges.size())] : static_cast<std::uint8_t>(random_());
    }
    void mutate(Bytes& bytes) {
        const auto at = bytes.empty() ? 0 : below(bytes.size());
        const auto place = bytes.begin() + static_cast<std::ptrdiff_t>(at);
        switch (below(4)) {
            case 0:
                if (!bytes.empty()) *place = any_byte();
                break;
            case 1:
                if (!bytes.empty()) bytes.erase(place);
                break;
            case 2:
                if (bytes.size() < max_size_) bytes.insert(place, any_byte());
                break;
            default:  // a part once more
                Bytes part(place,
                           place + static_cast<std::ptrdiff_t>(below(bytes.size() - at + 1)));
                part.resize(std::min(part.size(), max_size_ - bytes.size()));
                bytes.insert(bytes.end(), part.begin(), part.end());
        }
    }

    std::mt19937_64 random_;
    std::size_t max_size_;
    std::array<Bytes, 64> pool_;
};

}  // namespace

int main(int count, char** arguments) {
    __sanitizer_set_death_callback(keep_current);
    std::signal(SIGABRT, [](int) { keep_current(); });
    std::uint64_t runs = 100000, seed = 1;
    std::size_t max_size = 1024;
    bool replayed = false;
    for (const std::string_view argument :
         std::span(arguments, static_cast<std::size_t>(count)).subspan(1)) {
        const auto value = [&] {
            return std::stoull(std::string(argument.substr(argument.find('=') + 1)));
        };
        if (argument.starts_with("-runs=")) {
            runs = value();
        } else if (argument.starts_with("-seed=")) {
            seed = value();
        } else if (argument.starts_with("-max_len=")) {
            max_size = value();
        } else if (argument.starts_with("-")) {
            std::fprintf(stderr, "unknown option %s\n", std::string(argument).c_str());
            return 2;
        } else {
            std::ifstream file{std::string(argument), std::ios::binary};
            if (!file) {
                std::fprintf(stderr, "cannot read %s\n", std::string(argument).c_str());
                return 2;
            }
            run(Bytes(std::istreambuf_iterator<char>(file), {}));
            replayed = true;
        }
    }
    if (replayed) return 0;
    Generator generator(seed, max_size);
    for (std::uint64_t i = 0; i < runs; ++i) run(generator.next());
    std::fprintf(stderr, "Done %llu runs, seed %llu\n", static_cast<unsigned long long>(runs),
                 static_cast<unsigned long long>(seed));
}
