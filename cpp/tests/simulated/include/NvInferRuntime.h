// What the TensorRT backend uses of TensorRT's interface, declared anew for tests on machines without its headers: the
// names and the signatures are those of TensorRT 10 and 11, the layout is not. `scripts/check-cpp tensorrt` compiles
// the backend with the real headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

#define NV_TENSORRT_MAJOR 11
#define NV_TENSORRT_MINOR 0
#define NV_TENSORRT_VERSION 110000

namespace nvinfer1 {

struct Dims64 {
    static constexpr std::int32_t MAX_DIMS{8};
    std::int32_t nbDims;
    std::int64_t d[MAX_DIMS];
};
using Dims = Dims64;

class ILogger {
public:
    enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* msg) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;
    virtual bool setOptimizationProfileAsync(std::int32_t profileIndex, cudaStream_t stream) noexcept = 0;
    virtual bool setInputShape(const char* tensorName, const Dims& dims) noexcept = 0;
    virtual bool setTensorAddress(const char* tensorName, void* data) noexcept = 0;
    virtual bool enqueueV3(cudaStream_t stream) noexcept = 0;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept = default;
    virtual IExecutionContext* createExecutionContext() noexcept = 0;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    virtual ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept = 0;
};

} // namespace nvinfer1
