// What each backend's file offers. A backend that is not built in (its macro is 0) is never named at link time.
#pragma once

#include <memory>

#include "backend.hpp"

namespace diffx::core {

std::shared_ptr<Network> open_onnxruntime(const Bundle& bundle, const Options& options);
std::shared_ptr<Network> open_onnxruntime_cuda(const Bundle& bundle, const Options& options);
std::shared_ptr<Network> open_openvino(const Bundle& bundle, const Options& options);
std::shared_ptr<Network> open_tensorrt(const Bundle& bundle, const Options& options);
std::shared_ptr<Network> open_tensorrt_rtx(const Bundle& bundle, const Options& options);

} // namespace diffx::core
