// A stand-in for NVIDIA's driver and for the calls of CUDA's runtime and cuBLAS that onnxruntime makes: one GPU whose memory is
// the host's and whose kernels compute nothing. Preloaded, it shows what the real CUDA provider makes of our graphs, options,
// addresses and captures on a machine without a GPU. Every answer in numbers is meaningless. Notes go to the file STANDIN_LOG.
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#undef cudaGetDeviceProperties
#undef cudaGraphInstantiate

#define MEMORY (24ull << 30)

static void note(const char *what) {
    const char *path = getenv("STANDIN_LOG");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", what);
        fclose(file);
    }
}

static int take(void **pointer, size_t size) {
    *pointer = aligned_alloc(512, (size + 511) / 512 * 512);
    return *pointer ? 0 : 2;
}

static int handle(void *place) {
    *(void **)place = malloc(64);
    return 0;
}

// The driver.
typedef struct {
    size_t srcX, srcY;
    int srcType;
    const void *srcHost;
    uint64_t src;
    void *srcArray;
    size_t srcPitch, dstX, dstY;
    int dstType;
    void *dstHost;
    uint64_t dst;
    void *dstArray;
    size_t dstPitch, width, height;
} Copy2D;

int cuInit(unsigned flags) { return getenv("STANDIN_NO_GPU") ? 100 : 0; }
int cuTensorMapEncodeTiled(void) { return 100; }
int cuGetErrorString(int code, const char **text) { *text = "no CUDA-capable device is detected"; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "stand-in"); return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return 0; }
int cuCtxSetCurrent(void *context) { return context == (void *)8 ? 0 : 201; }
int cuCtxSynchronize(void) { return 0; }
int cuMemGetInfo_v2(size_t *free_, size_t *total) { *free_ = *total = MEMORY; return 0; }
int cuMemAlloc_v2(uint64_t *address, size_t size) { return take((void **)address, size); }
int cuMemFree_v2(uint64_t address) { free((void *)address); return 0; }
int cuMemHostAlloc(void **pointer, size_t size, unsigned flags) { return take(pointer, size); }
int cuMemFreeHost(void *pointer) { free(pointer); return 0; }
int cuMemsetD8_v2(uint64_t address, unsigned char value, size_t size) { memset((void *)address, value, size); return 0; }
int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t size) { memcpy((void *)to, from, size); return 0; }
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t size) { memcpy(to, (void *)from, size); return 0; }
int cuMemcpy2DUnaligned_v2(const Copy2D *copy) {
    if (copy->srcType != 2 || copy->dstType != 2) return 1;
    for (size_t row = 0; row < copy->height; row++)
        memcpy((char *)copy->dst + row * copy->dstPitch, (char *)copy->src + row * copy->srcPitch, copy->width);
    return 0;
}

// The runtime: a GPU of compute capability 9.0.
cudaError_t cudaGetDevice(int *device) { *device = 0; return 0; }
cudaError_t cudaSetDevice(int device) { return 0; }
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return 0; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *of, int device) {
    memset(of, 0, sizeof *of);
    strcpy(of->name, "stand-in");
    of->major = 9;
    of->totalGlobalMem = MEMORY;
    of->multiProcessorCount = 132;
    of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
    of->maxThreadsDim[2] = 64;
    of->sharedMemPerBlock = 48 << 10;
    of->sharedMemPerBlockOptin = 227 << 10;
    of->sharedMemPerMultiprocessor = 228 << 10;
    of->warpSize = 32;
    of->maxThreadsPerMultiProcessor = 2048;
    of->regsPerBlock = 65536;
    of->maxGridSize[0] = 0x7fffffff;
    of->maxGridSize[1] = of->maxGridSize[2] = 65535;
    return 0;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int device) {
    *value = which == cudaDevAttrComputeCapabilityMajor            ? 9
             : which == cudaDevAttrComputeCapabilityMinor          ? 0
             : which == cudaDevAttrMultiProcessorCount             ? 132
             : which == cudaDevAttrMaxSharedMemoryPerBlockOptin    ? 227 << 10
             : which == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? 228 << 10
                                                                    : 1;
    return 0;
}
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return 0; }
cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) { *free_ = *total = MEMORY; return 0; }
cudaError_t cudaMalloc(void **pointer, size_t size) { return take(pointer, size); }
cudaError_t cudaFree(void *pointer) { free(pointer); return 0; }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { free(pointer); return 0; }
cudaError_t cudaMallocFromPoolAsync(void **pointer, size_t size, cudaMemPool_t pool, cudaStream_t stream) { return take(pointer, size); }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) { return take(pointer, size); }
cudaError_t cudaMallocHost(void **pointer, size_t size) { return take(pointer, size); }
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return 0; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) { memcpy(to, from, size); return 0; }
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    note(kind == cudaMemcpyDeviceToHost ? "to host" : kind == cudaMemcpyHostToDevice ? "to device" : "copy");
    memcpy(to, from, size);
    return 0;
}
cudaError_t cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return 0; }
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) { memset(at, value, size); return 0; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *of, const void *pointer) {
    memset(of, 0, sizeof *of);
    of->type = cudaMemoryTypeDevice;
    of->devicePointer = (void *)pointer;
    return 0;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *of, const void *kernel) {
    memset(of, 0, sizeof *of);
    of->maxThreadsPerBlock = 1024;
    return 0;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *kernel, int block, size_t shared, unsigned flags) { *count = 2; return 0; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { return handle(event); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return handle(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) { *milliseconds = 1; return 0; }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { return handle(stream); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { return handle(stream); }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) { note("capture"); return 0; }
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) { return handle(graph); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) { return handle(made); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) { note("replay"); return 0; }
cudaError_t cudaMemPoolCreate(cudaMemPool_t *pool, const struct cudaMemPoolProps *properties) { return handle(pool); }
const char *cudaGetErrorName(cudaError_t error) { return "error"; }
const char *cudaGetErrorString(cudaError_t error) { return "error"; }

#define SUCCEEDS(name, ...) \
    cudaError_t name(__VA_ARGS__) { return 0; }
SUCCEEDS(cudaDeviceSynchronize, void)
SUCCEEDS(cudaEventDestroy, cudaEvent_t event)
SUCCEEDS(cudaEventRecord, cudaEvent_t event, cudaStream_t stream)
SUCCEEDS(cudaEventRecordWithFlags, cudaEvent_t event, cudaStream_t stream, unsigned flags)
SUCCEEDS(cudaEventSynchronize, cudaEvent_t event)
SUCCEEDS(cudaFuncSetAttribute, const void *kernel, enum cudaFuncAttribute which, int value)
SUCCEEDS(cudaGetLastError, void)
SUCCEEDS(cudaPeekAtLastError, void)
SUCCEEDS(cudaGraphDestroy, cudaGraph_t graph)
SUCCEEDS(cudaGraphExecDestroy, cudaGraphExec_t graph)
SUCCEEDS(cudaLaunchHostFunc, cudaStream_t stream, cudaHostFn_t call, void *data)
SUCCEEDS(cudaLaunchKernel, const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
SUCCEEDS(cudaLaunchCooperativeKernel, const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream)
SUCCEEDS(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *kernel, void **arguments)
SUCCEEDS(cudaMemPoolDestroy, cudaMemPool_t pool)
SUCCEEDS(cudaMemPoolSetAttribute, cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value)
SUCCEEDS(cudaMemPoolTrimTo, cudaMemPool_t pool, size_t size)
SUCCEEDS(cudaStreamDestroy, cudaStream_t stream)
SUCCEEDS(cudaStreamSynchronize, cudaStream_t stream)
SUCCEEDS(cudaStreamWaitEvent, cudaStream_t stream, cudaEvent_t event, unsigned flags)

// cuBLAS, whose arguments do not matter.
int cublasCreate_v2(void *place) { return handle(place); }
int cublasLtCreate(void *place) { return handle(place); }
int cublasGetMathMode(void *of, int *mode) { *mode = 0; return 0; }
int cublasDestroy_v2(void *of) { return 0; }
int cublasLtDestroy(void *of) { return 0; }
int cublasSetStream_v2(void *of, cudaStream_t stream) { return 0; }
int cublasSetMathMode(void *of, int mode) { return 0; }
int cublasGemmEx(void *of) { return 0; }
int cublasSgemm_v2(void *of) { return 0; }
int cublasGemmStridedBatchedEx(void *of) { return 0; }
int cublasGemmBatchedEx(void *of) { return 0; }

// cuDNN, of which our graphs need nothing; onnxruntime looks these up in a library of its name.
int cudnnCreate(void *place) { return handle(place); }
int cudnnDestroy(void *of) { return 0; }
int cudnnSetStream(void *of, cudaStream_t stream) { return 0; }
size_t cudnnGetVersion(void) { return 92800; }
const char *cudnnGetErrorString(int error) { return "error"; }
