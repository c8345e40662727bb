// What every operation of the extension shares.
#pragma once

#include <openvino/core/except.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include <functional>
#include <optional>

#include "kernels/packing.h"
#include "ops/team.h"

namespace chatglm {

// The value of an input of one integer, where it is known.
using KnownNumber = std::function<std::optional<int64_t>(size_t input)>;

// An operation with the version of the packed layouts as an attribute. Operations are evaluated by several streams
// at once on one object: they hold attributes only.
class Operation : public ov::op::Op {
public:
    OPENVINO_OP("Operation", "chatglm");
    Operation() = default;
    explicit Operation(const ov::OutputVector& arguments) : Op(arguments) {}

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const final {
        Team team;
        run(outputs, inputs, team);
        return true;
    }

    // Computes the outputs, with the threads of `team`.
    virtual void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const = 0;

    // Of what input 0 is, in operations that Chain runs.
    virtual ov::element::Type source_type() const { return ov::element::f32; }

    // Shape of output 0, made of that of input 0: asked of the operations that Chain runs.
    virtual ov::PartialShape output_shape(ov::PartialShape x, const KnownNumber&) const { return x; }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("packing_version", packing_version_);
        return true;
    }

protected:
    void check_version() const {
        OPENVINO_ASSERT(packing_version_ == kPackingVersion, get_type_name(), ": packing_version ", packing_version_,
                        ", wanted ", kPackingVersion, ": convert the checkpoint again with this version");
    }

    void check_inputs(size_t count) const {
        OPENVINO_ASSERT(get_input_size() == count, get_type_name(), ": ", get_input_size(), " inputs, wanted ", count);
    }

    void check_type(size_t input, ov::element::Type wanted) const {
        const auto& seen = get_input_element_type(input);
        OPENVINO_ASSERT(seen == wanted || seen.is_dynamic(), get_type_name(), ": input ", input, " is ", seen,
                        ", wanted ", wanted);
    }

    void check_elements(size_t input, int64_t count) const {
        const auto& shape = get_input_partial_shape(input);
        OPENVINO_ASSERT(shape.is_dynamic() || static_cast<int64_t>(ov::shape_size(shape.to_shape())) == count,
                        get_type_name(), ": input ", input, " of shape ", shape, ", wanted ", count, " elements");
    }

    // The same of what it is run with, which a Chain knows no sooner.
    void check_size(size_t input, const ov::Tensor& tensor, int64_t count) const {
        OPENVINO_ASSERT(static_cast<int64_t>(tensor.get_size()) == count, get_type_name(), ": input ", input,
                        " of shape ", tensor.get_shape(), ", wanted ", count, " elements");
    }

    void check_rank(size_t input, int64_t rank) const {
        const auto& shape = get_input_partial_shape(input);
        OPENVINO_ASSERT(shape.rank().compatible(rank), get_type_name(), ": input ", input, " of shape ", shape,
                        ", wanted ", rank, " dimensions");
    }

    void check_last_dim(size_t input, int64_t size) const {
        const auto& shape = get_input_partial_shape(input);
        OPENVINO_ASSERT(shape.rank().is_dynamic() || (shape.size() > 0 && shape[shape.size() - 1].compatible(size)),
                        get_type_name(), ": input ", input, " of shape ", shape, ", wanted a last dimension of ", size);
    }

    // A KnownNumber. The plugin hands in what is known when it runs as constants.
    std::optional<int64_t> constant_input(size_t input) const {
        const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(get_input_node_shared_ptr(input));
        if (constant == nullptr) return std::nullopt;
        return constant->cast_vector<int64_t>().at(0);
    }

    int64_t packing_version_ = kPackingVersion;
};

struct NoAttributes {};

// An operation whose copy with other inputs is itself with other inputs. Attributes: a struct of all it holds.
//
// Never by Node's copy constructor: that enters the copy among the readers of the inputs, and removes it again, in
// nodes that the graphs of all streams share without a lock.
template <typename Derived, typename Attributes>
class Cloned : public Operation, protected Attributes {
public:
    using Operation::Operation;
    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        auto clone = std::make_shared<Derived>();
        static_cast<Attributes&>(*clone) = *this;
        clone->packing_version_ = packing_version_;
        clone->set_arguments(inputs);
        clone->validate_and_infer_types();
        return clone;
    }
};

// The attributes of a packed weight.
struct PackedAttributes {
    std::string format = "int8";
    int64_t out_features = 0, in_features = 0, group_size = 0;

    PackedLayout layout() const { return {parse_format(format), out_features, in_features, group_size}; }

    void visit(ov::AttributeVisitor& visitor) {
        visitor.on_attribute("format", format);
        visitor.on_attribute("out_features", out_features);
        visitor.on_attribute("in_features", in_features);
        visitor.on_attribute("group_size", group_size);
    }
};

inline int64_t dim(const ov::Tensor& tensor, size_t axis) {
    return static_cast<int64_t>(tensor.get_shape()[axis]);
}

// The reader of an IR has no other way to report: its message becomes one line.
template <typename Function>
auto or_throw(const char* operation, const Function& function) {
    try {
        return function();
    } catch (const std::exception& error) {
        OPENVINO_THROW(operation, ": ", error.what());
    }
}

}  // namespace chatglm
