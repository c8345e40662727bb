#include "ops/chain.h"

#include <algorithm>
#include <deque>
#include <map>
#include <sstream>

#include "kernels/memory.h"
#include "ops/fully_connected.h"
#include "ops/last_rows.h"
#include "ops/multi_head_attention.h"
#include "ops/norm.h"

namespace chatglm {

struct ChainProgram {
    struct Source {
        bool is_step;
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
    size_t inputs = 0, buffers = 0;

    ChainProgram(const std::vector<std::string>& text, const std::vector<int64_t>& results);

    // Output of the chain that a step's result is, or -1.
    int64_t output_of(size_t step) const {
        const auto found = std::find(results.begin(), results.end(), static_cast<int64_t>(step));
        return found == results.end() ? -1 : found - results.begin();
    }

    // Shape of every step's result. `number` is asked for inputs of the chain.
    std::vector<ov::PartialShape> shapes(const ov::PartialShape& input, const KnownNumber& number) const {
        std::vector<ov::PartialShape> all;
        for (const Step& step : steps) {
            const auto number_of_step = [&](size_t i) {
                return step.sources.at(i).is_step ? std::nullopt : number(step.sources[i].index);
            };
            const ov::PartialShape& x = step.sources[0].is_step ? all[step.sources[0].index] : input;
            all.push_back(step.operation->output_shape(x, number_of_step));
        }
        return all;
    }

private:
    void add_step(const std::string& line);
    void choose_buffers();
};

namespace {

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
        adapter.set(std::stoll(value(name)));
    }
    void on_adapter(const std::string& name, ov::ValueAccessor<double>& adapter) override {
        adapter.set(std::stod(value(name)));
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
    OPENVINO_THROW("Chain: step '", type, "', wanted FullyConnected, MultiHeadAttention, Norm or LastRows");
}

}  // namespace

ChainProgram::ChainProgram(const std::vector<std::string>& text, const std::vector<int64_t>& results)
    : text(text), results(results) {
    for (const std::string& line : text) add_step(line);
    const auto count = static_cast<int64_t>(steps.size());
    OPENVINO_ASSERT(!results.empty(), "Chain: no results");
    for (int64_t step : results) OPENVINO_ASSERT(step >= 0 && step < count, "Chain: result ", step, " of ", count);
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
        const bool is_step = word[0] == '@';
        const size_t index = std::stoul(word.substr(is_step ? 1 : 0));
        OPENVINO_ASSERT(!is_step || index < steps.size(), "Chain: step ", steps.size(), " reads the result ", index);
        if (!is_step) inputs = std::max(inputs, index + 1);
        step.sources.push_back({is_step, index});
    }
    const auto reads_rows = [&](const Source& x) { return steps.empty() ? !x.is_step && x.index == 0 : x.is_step; };
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
            if (source.is_step) last_reader[source.index] = i;
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

void Chain::validate_and_infer_types() {
    check_version();
    OPENVINO_ASSERT(program_ != nullptr, "Chain: no steps");
    check_inputs(program_->inputs);
    check_type(0, ov::element::f32);
    const auto& x = get_input_partial_shape(0);
    OPENVINO_ASSERT(x.rank().is_static() && x.size() > 0 && x[x.size() - 1].is_static(), "Chain: input 0 of shape ", x,
                    ", wanted a known last dimension");
    const auto shapes = program_->shapes(x, [&](size_t input) { return constant_input(input); });
    for (size_t i = 0; i < results_.size(); ++i) {
        set_output_type(i, ov::element::f32, shapes[static_cast<size_t>(results_[i])]);
    }
}

bool Chain::visit_attributes(ov::AttributeVisitor& visitor) {
    visitor.on_attribute("steps", steps_);
    visitor.on_attribute("results", results_);
    if (program_ == nullptr || program_->text != steps_ || program_->results != results_) {
        program_ = std::make_shared<ChainProgram>(steps_, results_);
    }
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
        for (const auto& [is_step, index] : step.sources) sources.push_back(is_step ? results[index] : inputs[index]);
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
