// The only file that knows Python: numpy arrays in, numpy arrays out, no algorithm.
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <utility>

#include "alignment.hpp"
#include "edit_distance.hpp"
#include "tree.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace {

// c_style without forcecast, bound with noconvert(): an array of another type or layout is a
// TypeError, never a hidden copy.
using Int32 = py::array_t<std::int32_t, py::array::c_style>;
using Int64 = py::array_t<std::int64_t, py::array::c_style>;
using Float64 = py::array_t<double, py::array::c_style>;

template <typename Array>
auto view(const Array& array) {
    return std::span(array.data(), static_cast<std::size_t>(array.size()));
}

// The array takes the vector's buffer over; the capsule frees it with the array.
template <typename Value, typename Array = py::array_t<Value, py::array::c_style>>
Array own(std::vector<Value>&& values) {
    auto owned = std::make_unique<std::vector<Value>>(std::move(values));
    py::capsule capsule(owned.get(),
                        [](void* vector) { delete static_cast<std::vector<Value>*>(vector); });
    const auto& vector = *owned.release();
    return Array(static_cast<py::ssize_t>(vector.size()), vector.data(), capsule);
}

py::dict to_dict(stepagent::TokenTree&& tree) {
    return py::dict("input_ids"_a = own(std::move(tree.input_ids)),
                    "position_ids"_a = own(std::move(tree.position_ids)),
                    "subtree_end"_a = own(std::move(tree.subtree_end)),
                    "labels"_a = own(std::move(tree.labels)),
                    "label_rows"_a = own(std::move(tree.label_rows)),
                    "step_offsets"_a = own(std::move(tree.step_offsets)),
                    "step_trunk"_a = own(std::move(tree.step_trunk)),
                    "step_index"_a = own(std::move(tree.step_index)),
                    "step_branch"_a = own(std::move(tree.step_branch)));
}

py::list pack_step_pairs(const Int32& trunk_ids, const Int64& trunk_offsets,
                         const Int64& trunk_steps, const Int32& action_spans,
                         const Int32& branch_ids, const Int64& branch_offsets,
                         const Int64& step_branches, std::int64_t max_tokens) {
    const stepagent::StepPairs pairs{{view(trunk_ids), view(trunk_offsets)},
                                     view(trunk_steps),
                                     view(action_spans),
                                     {view(branch_ids), view(branch_offsets)},
                                     view(step_branches)};
    std::vector<stepagent::TokenTree> trees;
    {
        py::gil_scoped_release release;
        trees = stepagent::pack_step_pairs(pairs, max_tokens);
    }
    py::list result;
    for (auto& tree : trees) result.append(to_dict(std::move(tree)));
    return result;
}

std::int64_t edit_distance(const Int32& a, const Int32& b, std::int64_t cutoff) {
    const auto a_ids = view(a), b_ids = view(b);
    py::gil_scoped_release release;
    return stepagent::EditDistance()(a_ids, b_ids, cutoff);
}

py::tuple align_tokens(const Int64& recorded_offsets, const Int64& retokenized_offsets,
                       const Int32& recorded_ids, const Int32& retokenized_ids) {
    const stepagent::Tokenization recorded{"recorded_offsets", view(recorded_offsets),
                                           view(recorded_ids)};
    const stepagent::Tokenization retokenized{"retokenized_offsets", view(retokenized_offsets),
                                              view(retokenized_ids)};
    stepagent::TokenAlignment alignment;
    {
        py::gil_scoped_release release;
        alignment = stepagent::align_tokens(recorded, retokenized);
    }
    return py::make_tuple(own(std::move(alignment.pairs)), own(std::move(alignment.seams)));
}

Int32 token_spans(const Int64& char_spans, const Int64& offsets) {
    const auto spans = view(char_spans);
    const stepagent::Tokenization tokens{"offsets", view(offsets)};
    std::vector<std::int32_t> result;
    {
        py::gil_scoped_release release;
        result = stepagent::token_spans(spans, tokens);
    }
    return own(std::move(result));
}

Int64 char_spans(const Int64& token_spans, const Int64& offsets) {
    const auto spans = view(token_spans);
    const stepagent::Tokenization tokens{"offsets", view(offsets)};
    std::vector<std::int64_t> result;
    {
        py::gil_scoped_release release;
        result = stepagent::char_spans(spans, tokens);
    }
    return own(std::move(result));
}

Float64 step_costs(const Int32& expert_ids, const Int64& expert_offsets, const Int32& agent_ids,
                   const Int64& agent_offsets, std::int64_t band) {
    const stepagent::Ragged expert{view(expert_ids), view(expert_offsets)};
    const stepagent::Ragged agent{view(agent_ids), view(agent_offsets)};
    std::vector<double> costs;
    {
        py::gil_scoped_release release;
        costs = stepagent::step_costs(expert, agent, band);
    }
    return own(std::move(costs));
}

py::tuple align_steps(const Float64& costs, stepagent::StepMethod method, std::int64_t band,
                      double cutoff) {
    const auto values = view(costs);
    const auto m = static_cast<std::size_t>(costs.shape(0));
    const auto n = static_cast<std::size_t>(costs.shape(1));
    stepagent::StepAlignment alignment;
    {
        py::gil_scoped_release release;
        alignment = stepagent::align_steps(values, m, n, method, band, cutoff);
    }
    return py::make_tuple(own(std::move(alignment.pairs)), alignment.distance);
}

}  // namespace

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
    m.def("pack_step_pairs", &pack_step_pairs, "trunk_ids"_a.noconvert(),
          "trunk_offsets"_a.noconvert(), "trunk_steps"_a.noconvert(), "action_spans"_a.noconvert(),
          "branch_ids"_a.noconvert(), "branch_offsets"_a.noconvert(), "step_branches"_a.noconvert(),
          "max_tokens"_a);

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
