/* The one name of CUDA's header that the TensorRT backend is compiled with, for tests on machines without CUDA. */
#pragma once

typedef struct CUstream_st* cudaStream_t;
