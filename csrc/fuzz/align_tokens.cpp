// align_tokens, token_spans and char_spans on well-formed and on hostile offsets.
#include <limits>
#include <optional>
#include <stdexcept>

#include "alignment.hpp"
#include "input.hpp"

namespace {

using stepagent::TokenAlignment;
using stepagent::Tokenization;

struct Text {
    std::vector<std::int64_t> offsets;
    std::vector<std::int32_t> ids;
    bool valid = true;

    std::size_t size() const { return offsets.size() / 2; }
    Tokenization tokens(bool with_ids) const {
        return {"offsets", offsets, with_ids ? ids : std::span<const std::int32_t>{}};
    }
};

Text text(fuzz::Input& input, bool hostile) {
    Text result;
    std::int64_t start = 0, end = 0, last_start = 0, last_end = 0;
    for (auto tokens = input.size(40); tokens > 0; --tokens) {
        const auto kind = input.raw(1) % 8;
        if (hostile && kind == 7) {
            start = static_cast<std::int64_t>(input.raw(8));
            end = static_cast<std::int64_t>(input.raw(8));
        } else if (kind == 0) {  // without characters, anywhere
            start = end = input.integer(0, 50);
        } else {
            start = kind == 1 ? input.integer(last_start, last_end) : last_end + (kind == 2);
            end = std::max(last_end, start + 1 + input.integer(0, 2));
        }
        result.offsets.insert(result.offsets.end(), {start, end});
        result.ids.push_back(static_cast<std::int32_t>(input.raw(1) % 2));
        result.valid &= 0 <= start && start <= end;
        if (start == end) continue;
        result.valid &= last_start <= start && last_end <= end;
        if (!result.valid || end > std::numeric_limits<std::int64_t>::max() / 2) break;
        last_start = start;
        last_end = end;
    }
    return result;
}

std::optional<TokenAlignment> align(const Text& a, const Text& b, bool with_ids) {
    try {
        auto result = stepagent::align_tokens(a.tokens(with_ids), b.tokens(with_ids));
        REQUIRE(a.valid && b.valid);
        return result;
    } catch (const std::invalid_argument&) {
        REQUIRE(!a.valid || !b.valid);
        return {};
    }
}

void check_alignment(const TokenAlignment& alignment, const Text& a, const Text& b, bool with_ids) {
    std::size_t i = 0, j = 0, seam = 0, prefix = 0;
    while (with_ids && prefix < std::min(a.size(), b.size()) && a.ids[prefix] == b.ids[prefix]) {
        ++prefix;
    }
    const auto step_over_seam = [&] {
        if (seam == alignment.seams.size()) return;
        const auto place = alignment.seams.begin() + static_cast<std::ptrdiff_t>(seam);
        if (static_cast<std::size_t>(place[0]) != i || static_cast<std::size_t>(place[2]) != j)
            return;
        REQUIRE(place[0] <= place[1] && place[2] <= place[3]);
        REQUIRE(place[0] < place[1] || place[2] < place[3]);
        i = static_cast<std::size_t>(place[1]);
        j = static_cast<std::size_t>(place[3]);
        seam += 4;
    };
    for (std::size_t k = 0; k < alignment.pairs.size(); k += 2) {
        step_over_seam();
        REQUIRE(static_cast<std::size_t>(alignment.pairs[k]) == i);
        REQUIRE(static_cast<std::size_t>(alignment.pairs[k + 1]) == j);
        REQUIRE(!with_ids || a.ids[i] == b.ids[j]);
        const bool empty = a.offsets[2 * i] == a.offsets[2 * i + 1];
        REQUIRE(i < prefix || empty == (b.offsets[2 * j] == b.offsets[2 * j + 1]));
        REQUIRE(i < prefix || empty || a.offsets[2 * i] == b.offsets[2 * j]);
        REQUIRE(i < prefix || empty || a.offsets[2 * i + 1] == b.offsets[2 * j + 1]);
        ++i;
        ++j;
    }
    step_over_seam();
    REQUIRE(i == a.size() && j == b.size() && seam == alignment.seams.size());
}

void check_mirrored(const TokenAlignment& one, const TokenAlignment& other) {
    REQUIRE(one.pairs.size() == other.pairs.size() && one.seams.size() == other.seams.size());
    for (std::size_t k = 0; k < one.pairs.size(); ++k) REQUIRE(one.pairs[k] == other.pairs[k ^ 1]);
    for (std::size_t k = 0; k < one.seams.size(); ++k) REQUIRE(one.seams[k] == other.seams[k ^ 2]);
}

void check_spans(fuzz::Input& input, const Text& text) {
    const std::int64_t start = input.integer(0, 60);
    const std::vector<std::int64_t> span{start, start + input.integer(0, 20)};
    std::vector<std::int32_t> tokens;
    try {
        tokens = stepagent::token_spans(span, text.tokens(false));
    } catch (const std::invalid_argument&) {
        bool cut = !text.valid;
        for (std::size_t i = 0; i < text.size(); ++i) {
            for (const auto border : span) {
                cut |= text.offsets[2 * i] < border && border < text.offsets[2 * i + 1];
            }
        }
        REQUIRE(cut);
        return;
    }
    for (std::size_t i = 0; i < text.size(); ++i) {
        const auto first = text.offsets[2 * i], end = text.offsets[2 * i + 1];
        const auto inside =
            tokens[0] <= static_cast<std::int32_t>(i) && static_cast<std::int32_t>(i) < tokens[1];
        REQUIRE(first == end || inside == (span[0] < end && first < span[1]));
    }
    const std::vector<std::int64_t> back(tokens.begin(), tokens.end());
    const auto characters = stepagent::char_spans(back, text.tokens(false));
    if (tokens[0] < tokens[1]) {
        REQUIRE(span[0] <= characters[0] && characters[1] <= span[1]);
        REQUIRE(stepagent::token_spans(characters, text.tokens(false)) == tokens);
    }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    fuzz::Input input(data, size);
    const auto kind = input.raw(1);
    const bool hostile = kind % 4 == 0, with_ids = kind % 8 > 4;
    const auto a = text(input, hostile);
    const auto b = text(input, hostile);
    if (const auto alignment = align(a, b, with_ids)) {
        check_alignment(*alignment, a, b, with_ids);
        check_mirrored(*alignment, *align(b, a, with_ids));
        REQUIRE(align(a, a, with_ids)->seams.empty());
    }
    check_spans(input, a);
    const std::vector<std::int64_t> span{input.integer(-2, 45), input.integer(-2, 45)};
    try {
        stepagent::char_spans(span, b.tokens(false));
    } catch (const std::invalid_argument&) {
    }
    return 0;
}
