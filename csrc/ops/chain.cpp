#include "ops/chain.h"

#include <algorithm>
#include <charconv>
#include <deque>
#include <map>
#include <sstream>

#include "kernels/memory.h"
#include "ops/embedding.h"
#include "ops/fully_connected.h"
#include "ops/last_rows.h"
#include "ops/multi_head_attention.h"
#include "ops/norm.h"

namespace chatglm {

struct ChainProgram {
    enum class From { input, step, constant };
    struct Source {
        From from;
        size_t index;
    };
    struct Step {
        std::shared_ptr<Operation> operation;
        std::vector<Source> sources;
        size_t buffer;  // of its result, where that is no output of the chain
    };
    std::vector<std::string> text;
    std::vector<int64_t> results;
    std::vector<Step> steps;
    size_t inputs = 0, buffers = 0, constant_count = 0;
    ov::OutputVector constants;  // which own the memory of:
    ov::TensorVector constant_tensors;

    ChainProgram(const std::vector<std::string>& text, const std::vector<int64_t>& results);

    // Output of the chain that a step's result is, or -1.
    int64_t output_of(size_t step) const {
        const auto found = std::find(results.begin(), results.end(), static_cast<int64_t>(step));
        return found == results.end() ? -1 : found - results.begin();
    }

    // Throws for what is no constant, and for another number of them than the steps name.
    void hold(const ov::OutputVector& nodes);

    // Throws for a step that does not fit its inputs, as an operation of its own would.
    void check(const ov::OutputVector& inputs) const;

    // Shape of every step's result. `number` is asked for inputs of the chain.
    std::vector<ov::PartialShape> shapes(const ov::PartialShape& input, const KnownNumber& number) const {
        std::vector<ov::PartialShape> all;
        for (const Step& step : steps) {
            const auto number_of_step = [&](size_t i) {
                const Source& source = step.sources.at(i);
                return source.from == From::input ? number(source.index) : std::nullopt;
            };
            const Source& rows = step.sources[0];
            const ov::PartialShape& x = rows.from == From::step ? all[rows.index] : input;
            all.push_back(step.operation->output_shape(x, number_of_step));
        }
        return all;
    }

private:
    void add_step(const std::string& line);
    void choose_buffers();
};

namespace {

// A number that is all of a text. Never by the locale of the process, in which a comma may stand for the point.
template <typename Number>
Number number(const std::string& text) {
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    OPENVINO_ASSERT(error == std::errc{} && end == text.data() + text.size(), "Chain: '", text, "', wanted a number");
    return value;
}

// Sets the attributes of an operation from text.
class TextAttributes : public ov::AttributeVisitor {
public:
    explicit TextAttributes(std::map<std::string, std::string> values) : values_(std::move(values)) {}

    void on_adapter(const std::string& name, ov::ValueAccessor<void>&) override {
        OPENVINO_THROW("Chain: attribute ", name, " of a type that is not known");
    }
    void on_adapter(const std::string& name, ov::ValueAccessor<std::string>& adapter) override {
        adapter.set(value(name));
    }
    void on_adapter(const std::string& name, ov::ValueAccessor<int64_t>& adapter) override {
        adapter.set(number<int64_t>(value(name)));
    }
    void on_adapter(const std::string& name, ov::ValueAccessor<double>& adapter) override {
        adapter.set(number<double>(value(name)));
    }

private:
    const std::string& value(const std::string& name) const {
        const auto found = values_.find(name);
        OPENVINO_ASSERT(found != values_.end(), "Chain: no attribute ", name);
        return found->second;
    }

    std::map<std::string, std::string> values_;
};

std::shared_ptr<Operation> make_operation(const std::string& type) {
    if (type == "FullyConnected") return std::make_shared<FullyConnected>();
    if (type == "MultiHeadAttention") return std::make_shared<MultiHeadAttention>();
    if (type == "Norm") return std::make_shared<Norm>();
    if (type == "LastRows") return std::make_shared<LastRows>();
    if (type == "Embedding") return std::make_shared<Embedding>();
    if (type == "EmbeddingRows") return std::make_shared<EmbeddingRows>();
    OPENVINO_THROW("Chain: step '", type,
                   "', wanted FullyConnected, MultiHeadAttention, Norm, LastRows, Embedding or EmbeddingRows");
}

}  // namespace

ChainProgram::ChainProgram(const std::vector<std::string>& text, const std::vector<int64_t>& results)
    : text(text), results(results) {
    for (const std::string& line : text) add_step(line);
    const auto count = static_cast<int64_t>(steps.size());
    OPENVINO_ASSERT(!results.empty(), "Chain: no results");
    for (int64_t step : results) {
        OPENVINO_ASSERT(step >= 0 && step < count, "Chain: result ", step, " of ", count);
        OPENVINO_ASSERT(std::count(results.begin(), results.end(), step) == 1, "Chain: result ", step, " twice");
    }
    choose_buffers();
}

void ChainProgram::add_step(const std::string& line) {
    std::istringstream words(line);
    std::string type, word;
    words >> type;
    Step step{make_operation(type), {}, 0};
    std::map<std::string, std::string> attributes;
    while (words >> word) {
        if (const size_t equals = word.find('='); equals != std::string::npos) {
            attributes[word.substr(0, equals)] = word.substr(equals + 1);
            continue;
        }
        const From from = word[0] == '@' ? From::step : word[0] == '#' ? From::constant : From::input;
        const auto index = number<size_t>(word.substr(from == From::input ? 0 : 1));
        OPENVINO_ASSERT(from != From::step || index < steps.size(), "Chain: step ", steps.size(), " reads the result ",
                        index);
        if (from == From::input) inputs = std::max(inputs, index + 1);
        if (from == From::constant) constant_count = std::max(constant_count, index + 1);
        step.sources.push_back({from, index});
    }
    const auto reads_rows = [&](const Source& x) {
        return steps.empty() ? x.from == From::input && x.index == 0 : x.from == From::step;
    };
    OPENVINO_ASSERT(!step.sources.empty() && reads_rows(step.sources[0]),
                    "Chain: first source of '", line, "', wanted input 0 in the first step and a result in others");
    TextAttributes visitor(std::move(attributes));
    step.operation->visit_attributes(visitor);
    steps.push_back(std::move(step));
}

// A result keeps its buffer until the last step that reads it has run.
void ChainProgram::choose_buffers() {
    std::vector<size_t> last_reader(steps.size(), 0);
    for (size_t i = 0; i < steps.size(); ++i) {
        for (const Source& source : steps[i].sources) {
            if (source.from == From::step) last_reader[source.index] = i;
        }
    }
    std::vector<size_t> free_from;  // by buffer: the first step whose result may lie in it
    for (size_t i = 0; i < steps.size(); ++i) {
        if (output_of(i) >= 0) continue;
        const auto found = std::find_if(free_from.begin(), free_from.end(), [&](size_t from) { return from <= i; });
        steps[i].buffer = static_cast<size_t>(found - free_from.begin());
        if (found == free_from.end()) free_from.push_back(0);
        free_from[steps[i].buffer] = std::max(last_reader[i], i) + 1;
    }
    buffers = free_from.size();
}

void ChainProgram::hold(const ov::OutputVector& nodes) {
    OPENVINO_ASSERT(nodes.size() == constant_count, "Chain: ", nodes.size(), " constants, wanted ", constant_count);
    for (const auto& node : nodes) {
        const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(node.get_node_shared_ptr());
        OPENVINO_ASSERT(constant != nullptr, "Chain: '", node.get_node()->get_friendly_name(), "', wanted a constant");
        constant_tensors.emplace_back(constant->get_element_type(), constant->get_shape(),
                                      const_cast<void*>(constant->get_data_ptr()));
    }
    constants = nodes;
}

void ChainProgram::check(const ov::OutputVector& inputs) const {
    ov::OutputVector made;
    for (const Step& step : steps) {
        ov::OutputVector sources;
        for (const auto& [from, index] : step.sources) {
            sources.push_back(from == From::step ? made[index] : from == From::input ? inputs[index] : constants[index]);
        }
        made.push_back(step.operation->clone_with_new_inputs(sources)->output(0));
    }
}

std::shared_ptr<Chain> Chain::make(const ov::OutputVector& inputs, ov::AttributeVisitor& visitor) {
    const auto chain = std::make_shared<Chain>();
    chain->visit_attributes(visitor);
    OPENVINO_ASSERT(chain->program_ != nullptr && chain->program_->inputs <= inputs.size(), "Chain: ", inputs.size(),
                    " inputs, fewer than its steps name");
    const auto constants = inputs.begin() + static_cast<std::ptrdiff_t>(chain->program_->inputs);
    chain->program_->hold({constants, inputs.end()});
    chain->program_->check({inputs.begin(), constants});
    chain->set_arguments(ov::OutputVector{inputs.begin(), constants});
    chain->constructor_validate_and_infer_types();
    return chain;
}

void Chain::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(program_ != nullptr, "Chain: no steps");
    check_inputs(program_->inputs);
    check_type(0, program_->steps[0].operation->source_type());
    const auto& x = get_input_partial_shape(0);
    OPENVINO_ASSERT(x.rank().is_static(), "Chain: input 0 of shape ", x, ", wanted a known rank");
    const auto shapes = program_->shapes(x, [&](size_t input) { return constant_input(input); });
    for (size_t i = 0; i < results_.size(); ++i) {
        set_output_type(i, ov::element::f32, shapes[static_cast<size_t>(results_[i])]);
    }
}

bool Chain::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("steps", steps_);
    visitor.on_attribute("results", results_);
    if (program_ == nullptr) program_ = std::make_shared<ChainProgram>(steps_, results_);
    OPENVINO_ASSERT(program_->text == steps_ && program_->results == results_,
                    "Chain: other steps than it was made of");
    return Operation::visit_attributes(visitor);
}

void Chain::run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const {
    static thread_local std::deque<Scratch> buffers;
    while (buffers.size() < program_->buffers) buffers.emplace_back();
    const auto shapes = program_->shapes(
        inputs[0].get_shape(), [&](size_t input) { return *inputs[input].data<const int32_t>(); });
    ov::TensorVector results;
    for (size_t i = 0; i < program_->steps.size(); ++i) {
        const ChainProgram::Step& step = program_->steps[i];
        ov::TensorVector sources;
        for (const auto& [from, index] : step.sources) {
            sources.push_back(from == ChainProgram::From::step    ? results[index]
                              : from == ChainProgram::From::input ? inputs[index]
                                                                  : program_->constant_tensors[index]);
        }
        const ov::Shape shape = shapes[i].to_shape();
        if (const int64_t output = program_->output_of(i); output >= 0) {
            outputs[static_cast<size_t>(output)].set_shape(shape);
            results.push_back(outputs[static_cast<size_t>(output)]);
        } else {
            const auto size = static_cast<int64_t>(ov::shape_size(shape));
            results.emplace_back(ov::element::f32, shape, buffers[step.buffer].get<float>(size));
        }
        ov::TensorVector result{results.back()};
        step.operation->run(result, sources, team);
    }
}

}  // namespace chatglm
