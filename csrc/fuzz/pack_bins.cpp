// pack_bins against best-fit decreasing by looking at every bin, and the fewest bins there are.
#include <numeric>
#include <stdexcept>

#include "input.hpp"
#include "packing.hpp"

namespace {

using Lengths = std::vector<std::int64_t>;

struct Bin {
    std::int64_t room;
    std::vector<std::int64_t> items;
};

std::vector<Bin> best_fit(const Lengths& lengths, std::int64_t capacity) {
    std::vector<std::size_t> order(lengths.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
        return lengths[a] != lengths[b] ? lengths[a] > lengths[b] : a > b;
    });
    std::vector<Bin> bins;
    for (const auto item : order) {
        Bin* best = nullptr;
        for (auto& bin : bins) {
            if (bin.room >= lengths[item] && (!best || bin.room < best->room)) best = &bin;
        }
        if (!best) best = &bins.emplace_back(Bin{capacity, {}});
        best->room -= lengths[item];
        best->items.push_back(static_cast<std::int64_t>(item));
    }
    return bins;
}

// The fewest bins, by trying each for each item.
std::size_t fewest(const Lengths& lengths, std::size_t item, Lengths& rooms,
                   std::int64_t capacity) {
    if (item == lengths.size()) return rooms.size();
    rooms.push_back(capacity - lengths[item]);
    auto best = fewest(lengths, item + 1, rooms, capacity);
    rooms.pop_back();
    for (auto& room : rooms) {
        if (room < lengths[item]) continue;
        room -= lengths[item];
        best = std::min(best, fewest(lengths, item + 1, rooms, capacity));
        room += lengths[item];
    }
    return best;
}

void check_bins(const stepagent::Groups& groups, const Lengths& lengths, std::int64_t capacity) {
    const auto bins = groups.offsets.size() - 1;
    std::vector<int> times(lengths.size());
    std::size_t half_empty = 0;
    for (std::size_t b = 0; b < bins; ++b) {
        REQUIRE(groups.offsets[b] < groups.offsets[b + 1]);
        auto room = capacity;
        for (auto n = groups.offsets[b]; n < groups.offsets[b + 1]; ++n) {
            const auto item = static_cast<std::size_t>(groups.items[static_cast<std::size_t>(n)]);
            REQUIRE(item < lengths.size() && lengths[item] <= room);
            room -= lengths[item];
            ++times[item];
        }
        half_empty += room >= capacity - capacity / 2;
    }
    REQUIRE(half_empty <= 1);  // two of them would have been one
    REQUIRE(std::all_of(times.begin(), times.end(), [](int n) { return n == 1; }));
    if (lengths.size() <= 6) {
        Lengths rooms;
        REQUIRE(2 * bins <= 3 * fewest(lengths, 0, rooms, capacity));  // Simchi-Levi (1994)
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const auto capacity = kind % 8 == 0   ? static_cast<std::int64_t>(input.raw(8))
                          : kind % 8 == 1 ? std::int64_t{1} << 62
                                          : input.integer(1, 40);
    Lengths lengths(input.size(40));
    for (auto& length : lengths) length = input.integer(1, std::max<std::int64_t>(1, capacity));
    if (kind > 200 && !lengths.empty()) {
        const auto any = input.raw(1);
        lengths[input.size(lengths.size() - 1)] = any == 0 ? 0
                                                  : any == 1
                                                      ? capacity
                                                      : static_cast<std::int64_t>(input.raw(8));
    }
    const bool valid = std::all_of(lengths.begin(), lengths.end(),
                                   [&](auto length) { return 1 <= length && length <= capacity; });
    stepagent::Groups groups;
    try {
        groups = stepagent::pack_bins(lengths, capacity);
        REQUIRE(valid);
    } catch (const std::invalid_argument&) {
        REQUIRE(!valid);
        return 0;
    }
    check_bins(groups, lengths, capacity);
    stepagent::Groups expected;
    for (const auto& bin : best_fit(lengths, capacity)) {
        expected.items.insert(expected.items.end(), bin.items.begin(), bin.items.end());
        expected.offsets.push_back(static_cast<std::int64_t>(expected.items.size()));
    }
    REQUIRE(groups.items == expected.items && groups.offsets == expected.offsets);
    return 0;
}
