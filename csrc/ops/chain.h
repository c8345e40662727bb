// Operations that follow one another, as one operation.
#pragma once

#include <openvino/core/op_extension.hpp>

#include "ops/operation.h"

namespace chatglm {

struct ChainProgram;

struct ChainAttributes {
    std::vector<std::string> steps_;
    std::vector<int64_t> results_;
    std::shared_ptr<ChainProgram> program_;
};

// OpenVINO asks an operation of another library for its shapes at every call, by a copy of it made from scratch: what
// lies between two operations costs tens of microseconds once a pass over gigabytes of weights has emptied the caches.
// A chain is asked once.
//
// A step is "Type source source ... name=value name=value ...": its operation (FullyConnected, MultiHeadAttention in
// place, Norm, LastRows, Embedding or EmbeddingRows), where its inputs come from ("3": input 3 of the chain; "@3": the
// result of step 3; "#3": constant 3), and its attributes. The first source of the first step is input 0, that of every
// other one is a result: so the shapes of all results follow from that of input 0, and from the count of LastRows.
// Inputs: those that the steps name, then the constants, which are no inputs any more once the chain is made
// (ChainExtension): each input of a chain is copied, too, when it is asked for its shapes.
// Outputs: the results of the steps `results`, float32.
class Chain : public Cloned<Chain, ChainAttributes> {
public:
    OPENVINO_OP("Chain", "chatglm", Operation);
    using Cloned::Cloned;

    // Another one of `inputs` as above. Throws for constants that are none, and for steps that do not fit.
    static std::shared_ptr<Chain> make(const ov::OutputVector& inputs, ov::AttributeVisitor& visitor);

    void validate_and_infer_types() override;
    bool visit_attributes(ov::AttributeVisitor& visitor) override;
    void run(ov::TensorVector& outputs, const ov::TensorVector& inputs, Team& team) const override;
};

// How OpenVINO makes chains.
class ChainExtension : public ov::OpExtension<Chain> {
public:
    ov::OutputVector create(const ov::OutputVector& inputs, ov::AttributeVisitor& visitor) const override {
        return Chain::make(inputs, visitor)->outputs();
    }
};

}  // namespace chatglm
