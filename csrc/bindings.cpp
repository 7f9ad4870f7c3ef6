// The only file that knows Python: numpy arrays in, numpy arrays out, no algorithm.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "alignment.hpp"
#include "edit_distance.hpp"
#include "forks.hpp"
#include "masks.hpp"
#include "packing.hpp"
#include "tree.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// c_style without forcecast, bound with noconvert(): an array of another type or layout is a
// TypeError, never a hidden copy.
template <typename Value>
using Array = py::array_t<Value, py::array::c_style>;

template <typename Value>
std::span<const Value> view(const Array<Value>& array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

// The same for an entry of a list; the list keeps the array alive.
template <typename Value>
std::optional<std::span<const Value>> view_if(py::handle entry) {
    if (!Array<Value>::check_(entry)) return std::nullopt;
    return view(py::reinterpret_borrow<Array<Value>>(entry));
}

[[noreturn]] void refuse(py::handle entry) {
    throw py::type_error("an entry must be a contiguous array of the expected dtype, got " +
                         std::string(py::repr(entry)));
}

template <typename Value>
std::vector<std::span<const Value>> views(const py::list& list) {
    std::vector<std::span<const Value>> result;
    result.reserve(list.size());
    for (const auto entry : list) {
        const auto array = view_if<Value>(entry);
        if (!array) refuse(entry);
        result.push_back(*array);
    }
    return result;
}

stepagent::AnyIds ids(py::handle entry) {
    if (const auto array = view_if<std::int32_t>(entry)) return *array;
    if (const auto array = view_if<std::int64_t>(entry)) return *array;
    if (const auto array = view_if<std::uint64_t>(entry)) return *array;
    refuse(entry);
}

std::vector<stepagent::AnyIds> all_ids(const py::list& list) {
    std::vector<stepagent::AnyIds> result;
    result.reserve(list.size());
    for (const auto entry : list) result.push_back(ids(entry));
    return result;
}

// The array takes the vector's buffer over; the capsule frees it with the array.
template <typename Value>
Array<Value> own(std::vector<Value>&& values) {
    auto owned = std::make_unique<std::vector<Value>>(std::move(values));
    py::capsule capsule(owned.get(),
                        [](void* vector) { delete static_cast<std::vector<Value>*>(vector); });
    const auto& vector = *owned.release();
    return Array<Value>(static_cast<py::ssize_t>(vector.size()), vector.data(), capsule);
}

template <typename Work>
auto without_gil(const Work& work) {
    const py::gil_scoped_release release;
    return work();
}

py::list to_list(std::vector<stepagent::TokenTree>&& trees) {
    py::list result;
    for (auto& tree : trees) {
        result.append(py::dict("input_ids"_a = own(std::move(tree.input_ids)),
                               "position_ids"_a = own(std::move(tree.position_ids)),
                               "subtree_end"_a = own(std::move(tree.subtree_end)),
                               "labels"_a = own(std::move(tree.labels)),
                               "label_rows"_a = own(std::move(tree.label_rows)),
                               "step_offsets"_a = own(std::move(tree.step_offsets)),
                               "step_trunk"_a = own(std::move(tree.step_trunk)),
                               "step_index"_a = own(std::move(tree.step_index)),
                               "step_branch"_a = own(std::move(tree.step_branch))));
    }
    return result;
}

py::list pack_step_pairs(const py::list& trunks, const py::list& action_spans,
                         const py::list& rewinds, const py::list& branches,
                         const Array<std::int64_t>& branch_counts,
                         std::optional<std::int64_t> max_tokens, std::size_t threads) {
    const auto trunk_ids = all_ids(trunks), branch_ids = all_ids(branches);
    const auto spans = views<std::int32_t>(action_spans), backs = views<std::int32_t>(rewinds);
    const stepagent::StepPairs pairs{trunk_ids, spans, backs, branch_ids, view(branch_counts)};
    return to_list(
        without_gil([&] { return stepagent::pack_step_pairs(pairs, max_tokens, threads); }));
}

py::list pack_sequences(const py::list& sequences, const py::list& action_masks,
                        std::optional<std::int64_t> max_tokens, std::size_t threads) {
    const auto tokens = all_ids(sequences);
    const auto masks = views<std::uint8_t>(action_masks);
    return to_list(without_gil(
        [&] { return stepagent::pack_sequences({tokens, masks}, max_tokens, threads); }));
}

std::size_t window_or_none(std::optional<std::size_t> window) {
    return window.value_or(stepagent::no_window);
}

template <typename Value>
void fill(const Array<std::int32_t>& subtree_end, std::optional<std::size_t> window,
          std::uint64_t visible, std::uint64_t hidden, py::array& mask, std::size_t threads) {
    const std::span values(static_cast<Value*>(mask.mutable_data()),
                           static_cast<std::size_t>(mask.size()));
    without_gil([&] {
        stepagent::fill_mask<Value>(view(subtree_end), window_or_none(window),
                                    static_cast<Value>(visible), static_cast<Value>(hidden), values,
                                    threads);
    });
}

// Values are bit patterns, as wide as the mask's items.
void fill_mask(const Array<std::int32_t>& subtree_end, std::optional<std::size_t> window,
               std::uint64_t visible, std::uint64_t hidden, py::array mask, std::size_t threads) {
    if ((mask.flags() & py::array::c_style) == 0)
        throw py::type_error("the mask must be contiguous, got a view that is not");
    switch (mask.itemsize()) {
        case 1:
            return fill<std::uint8_t>(subtree_end, window, visible, hidden, mask, threads);
        case 2:
            return fill<std::uint16_t>(subtree_end, window, visible, hidden, mask, threads);
        case 4:
            return fill<std::uint32_t>(subtree_end, window, visible, hidden, mask, threads);
        case 8:
            return fill<std::uint64_t>(subtree_end, window, visible, hidden, mask, threads);
        default:
            throw py::type_error("a mask's items must have 1, 2, 4 or 8 bytes, got " +
                                 std::to_string(mask.itemsize()));
    }
}

py::tuple block_lists(const Array<std::int32_t>& subtree_end, std::optional<std::size_t> window,
                      std::size_t block_size) {
    auto lists = without_gil([&] {
        return stepagent::block_lists(view(subtree_end), window_or_none(window), block_size);
    });
    return py::make_tuple(own(std::move(lists.partial_counts)),
                          own(std::move(lists.partial_indices)), own(std::move(lists.full_counts)),
                          own(std::move(lists.full_indices)));
}

py::dict segments(const Array<std::int32_t>& subtree_end) {
    auto result = without_gil([&] { return stepagent::segments(view(subtree_end)); });
    return py::dict("offsets"_a = own(std::move(result.offsets)),
                    "parents"_a = own(std::move(result.parents)),
                    "depths"_a = own(std::move(result.depths)),
                    "path_offsets"_a = own(std::move(result.path_offsets)),
                    "path_rows"_a = own(std::move(result.path_rows)));
}

py::dict fork_early(const Array<std::int32_t>& input_ids, const Array<std::int32_t>& position_ids,
                    const Array<std::int32_t>& subtree_end, const Array<std::int32_t>& labels,
                    const Array<std::int32_t>& label_rows,
                    const Array<std::int32_t>& step_offsets) {
    auto forked = without_gil([&] {
        return stepagent::fork_early({view(input_ids), view(position_ids), view(subtree_end),
                                      view(labels), view(label_rows), view(step_offsets)});
    });
    return py::dict("input_ids"_a = own(std::move(forked.input_ids)),
                    "position_ids"_a = own(std::move(forked.position_ids)),
                    "subtree_end"_a = own(std::move(forked.subtree_end)),
                    "label_rows"_a = own(std::move(forked.label_rows)));
}

py::tuple to_tuple(stepagent::Groups&& groups) {
    return py::make_tuple(own(std::move(groups.items)), own(std::move(groups.offsets)));
}

py::tuple pack_bins(const Array<std::int64_t>& lengths, std::int64_t capacity) {
    return to_tuple(without_gil([&] { return stepagent::pack_bins(view(lengths), capacity); }));
}

py::tuple balance(const Array<double>& costs, std::size_t parts, bool equal_size) {
    return to_tuple(
        without_gil([&] { return stepagent::balance(view(costs), parts, equal_size); }));
}

std::int64_t edit_distance(const Array<std::int32_t>& a, const Array<std::int32_t>& b,
                           std::int64_t cutoff) {
    const auto a_ids = view(a), b_ids = view(b);
    return without_gil([&] { return stepagent::EditDistance()(a_ids, b_ids, cutoff); });
}

py::tuple align_tokens(const Array<std::int64_t>& recorded_offsets,
                       const Array<std::int64_t>& retokenized_offsets,
                       const Array<std::int32_t>& recorded_ids,
                       const Array<std::int32_t>& retokenized_ids) {
    const stepagent::Tokenization recorded{"recorded_offsets", view(recorded_offsets),
                                           view(recorded_ids)};
    const stepagent::Tokenization retokenized{"retokenized_offsets", view(retokenized_offsets),
                                              view(retokenized_ids)};
    auto alignment = without_gil([&] { return stepagent::align_tokens(recorded, retokenized); });
    return py::make_tuple(own(std::move(alignment.pairs)), own(std::move(alignment.seams)));
}

Array<std::int32_t> token_spans(const Array<std::int64_t>& char_spans,
                                const Array<std::int64_t>& offsets) {
    const auto spans = view(char_spans);
    const stepagent::Tokenization tokens{"offsets", view(offsets)};
    auto result = without_gil([&] { return stepagent::token_spans(spans, tokens); });
    return own(std::move(result));
}

Array<std::int64_t> char_spans(const Array<std::int64_t>& token_spans,
                               const Array<std::int64_t>& offsets) {
    const auto spans = view(token_spans);
    const stepagent::Tokenization tokens{"offsets", view(offsets)};
    auto result = without_gil([&] { return stepagent::char_spans(spans, tokens); });
    return own(std::move(result));
}

Array<double> step_costs(const Array<std::int32_t>& expert_ids,
                         const Array<std::int64_t>& expert_offsets,
                         const Array<std::int32_t>& agent_ids,
                         const Array<std::int64_t>& agent_offsets, std::int64_t band) {
    const stepagent::Ragged expert{view(expert_ids), view(expert_offsets)};
    const stepagent::Ragged agent{view(agent_ids), view(agent_offsets)};
    auto costs = without_gil([&] { return stepagent::step_costs(expert, agent, band); });
    return own(std::move(costs));
}

py::tuple align_steps(const Array<double>& costs, stepagent::StepMethod method, std::int64_t band,
                      double cutoff) {
    const auto values = view(costs);
    const auto m = static_cast<std::size_t>(costs.shape(0));
    const auto n = static_cast<std::size_t>(costs.shape(1));
    auto alignment =
        without_gil([&] { return stepagent::align_steps(values, m, n, method, band, cutoff); });
    return py::make_tuple(own(std::move(alignment.pairs)), alignment.distance);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.def("pack_step_pairs", &pack_step_pairs, "trunks"_a, "action_spans"_a, "rewinds"_a,
          "branches"_a, "branch_counts"_a.noconvert(), "max_tokens"_a, "threads"_a);
    m.def("pack_sequences", &pack_sequences, "sequences"_a, "action_masks"_a, "max_tokens"_a,
          "threads"_a);
    m.def("fill_mask", &fill_mask, "subtree_end"_a.noconvert(), "window"_a, "visible"_a, "hidden"_a,
          "mask"_a.noconvert(), "threads"_a);
    m.def("block_lists", &block_lists, "subtree_end"_a.noconvert(), "window"_a, "block_size"_a);
    m.def("segments", &segments, "subtree_end"_a.noconvert());
    m.def("fork_early", &fork_early, "input_ids"_a.noconvert(), "position_ids"_a.noconvert(),
          "subtree_end"_a.noconvert(), "labels"_a.noconvert(), "label_rows"_a.noconvert(),
          "step_offsets"_a.noconvert());
    m.def("pack_bins", &pack_bins, "lengths"_a.noconvert(), "capacity"_a);
    m.def("balance", &balance, "costs"_a.noconvert(), "parts"_a, "equal_size"_a);

    py::native_enum<stepagent::StepMethod>(m, "StepMethod", "enum.Enum")
        .value("nw", stepagent::StepMethod::needleman_wunsch)
        .value("lcs", stepagent::StepMethod::lcs)
        .value("dtw", stepagent::StepMethod::dtw)
        .finalize();
    m.def("edit_distance", &edit_distance, "a"_a.noconvert(), "b"_a.noconvert(), "cutoff"_a);
    m.def("align_tokens", &align_tokens, "recorded_offsets"_a.noconvert(),
          "retokenized_offsets"_a.noconvert(), "recorded_ids"_a.noconvert(),
          "retokenized_ids"_a.noconvert());
    m.def("token_spans", &token_spans, "char_spans"_a.noconvert(), "offsets"_a.noconvert());
    m.def("char_spans", &char_spans, "token_spans"_a.noconvert(), "offsets"_a.noconvert());
    m.def("step_costs", &step_costs, "expert_ids"_a.noconvert(), "expert_offsets"_a.noconvert(),
          "agent_ids"_a.noconvert(), "agent_offsets"_a.noconvert(), "band"_a);
    m.def("align_steps", &align_steps, "costs"_a.noconvert(), "method"_a, "band"_a, "cutoff"_a);
}
