// The entry point that OpenVINO's Core looks for in an extension library.
#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>

#include "ops/cache_table.h"
#include "ops/chain.h"
#include "ops/embedding.h"
#include "ops/fully_connected.h"
#include "ops/last_rows.h"
#include "ops/multi_head_attention.h"
#include "ops/norm.h"
#include "ops/rotary_embedding.h"

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<chatglm::FullyConnected>>(),
    std::make_shared<ov::OpExtension<chatglm::Embedding>>(),
    std::make_shared<ov::OpExtension<chatglm::EmbeddingRows>>(),
    std::make_shared<ov::OpExtension<chatglm::Norm>>(),
    std::make_shared<ov::OpExtension<chatglm::RotaryEmbedding>>(),
    std::make_shared<ov::OpExtension<chatglm::CacheTable>>(),
    std::make_shared<ov::OpExtension<chatglm::MultiHeadAttention>>(),
    std::make_shared<ov::OpExtension<chatglm::LastRows>>(),
    std::make_shared<chatglm::ChainExtension>(),
}));
