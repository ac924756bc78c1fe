// Which captured graph a launch becomes part of (board.py).
#pragma once
#include <cuda_runtime.h>

// The id of the capture that the stream is in, or 0.
extern "C" unsigned long long capture_id(cudaStream_t stream) {
    cudaStreamCaptureStatus status;
    unsigned long long id = 0;
    return cudaStreamGetCaptureInfo(stream, &status, &id) == cudaSuccess && status == cudaStreamCaptureStatusActive ? id : 0;
}
