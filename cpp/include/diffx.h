/* diffx.h: samples from diffexport bundles, for C and every language that calls C.
 *
 * The ABI is stable: functions are only ever added, structs only ever grow at their end, and each struct carries the
 * size that its caller knows. No function throws, keeps a pointer that it was given, or calls back from another thread.
 * A bundle may be used from several threads at once; a sampler belongs to one thread at a time, and samplers of one
 * bundle share its weights. Handles may be freed in any order; freeing NULL does nothing. */
#ifndef DIFFX_H
#define DIFFX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DIFFX_ABI 1
#define DIFFX_API __attribute__((visibility("default")))

typedef enum diffx_status {
    DIFFX_OK = 0,
    DIFFX_BUNDLE_ERROR = 1,  /* a bundle that is missing, damaged, altered or of another version */
    DIFFX_PLAN_ERROR = 2,    /* a sampler, guidance or number of steps that cannot be */
    DIFFX_SHAPE_ERROR = 3,   /* labels, counts or arrays that do not fit the model */
    DIFFX_BACKEND_ERROR = 4, /* a runtime that is missing, cannot run here, or failed */
    DIFFX_PARITY_ERROR = 5,  /* results that differ from the recorded ones by more than the limit */
    DIFFX_INTERNAL_ERROR = 6 /* out of memory, or a mistake of this library */
} diffx_status;

typedef struct diffx_bundle diffx_bundle;
typedef struct diffx_sampler diffx_sampler;

/* What went wrong last in this thread, one line; valid until the next call in this thread. */
DIFFX_API const char* diffx_last_error(void);
DIFFX_API const char* diffx_version(void);
/* Names of the backends that this library was built with, separated by spaces: "ort openvino". */
DIFFX_API const char* diffx_backends(void);

/* Open a bundle and check every file against its manifest. */
DIFFX_API diffx_status diffx_bundle_open(const char* path, diffx_bundle** bundle);
DIFFX_API void diffx_bundle_free(diffx_bundle* bundle);
DIFFX_API const char* diffx_bundle_name(const diffx_bundle* bundle);
/* Shape of one image, (C, H, W) or (D); returns the number of sides, of which at most 3 are written. */
DIFFX_API size_t diffx_bundle_shape(const diffx_bundle* bundle, int64_t shape[3]);
/* Number of labels; 0 for a model without labels. */
DIFFX_API int64_t diffx_bundle_num_classes(const diffx_bundle* bundle);
/* Name of a label, or NULL where labels have no names. */
DIFFX_API const char* diffx_bundle_label_name(const diffx_bundle* bundle, int64_t label);

typedef struct diffx_options {
    size_t size;     /* sizeof(diffx_options) */
    int32_t threads; /* threads of one operator on a CPU; 0: every core that this process may use */
    int32_t device;  /* index of the GPU */
    int32_t
        selftest; /* golden cases before the first sample: 0 where a backend compiles for a GPU; 1 always; -1 never */
    int32_t cuda_graph; /* launch a step of TensorRT as one CUDA graph: 0 yes; -1 no */
} diffx_options;

/* Load the graphs on a backend: "ort", "ort-cuda", "openvino", "trt", "trt-rtx". options may be NULL. */
DIFFX_API diffx_status diffx_sampler_open(diffx_bundle* bundle, const char* backend, const diffx_options* options,
                                          diffx_sampler** sampler);
DIFFX_API void diffx_sampler_free(diffx_sampler* sampler);
/* What the sampler really runs on, as the runtime says: "CPU". */
DIFFX_API const char* diffx_sampler_device(const diffx_sampler* sampler);

typedef struct diffx_request {
    size_t size;           /* sizeof(diffx_request) */
    const int64_t* labels; /* one for each image; NULL: 0, 1, 2, ... in turn */
    size_t num_labels;     /* how many labels there are: num, or 0 with NULL */
    size_t num;            /* number of images */
    const char* sampler;   /* NULL: the bundle's default */
    int32_t steps;         /* 0: the bundle's default */
    int32_t batch;         /* how many are drawn at once; 0: the bundle's default; of no influence on the images */
    double guidance_scale; /* w of uncond + w*(cond - uncond); 1 is off; NaN: the bundle's default */
    uint64_t seed;         /* seed and index alone decide an image */
    uint64_t first;        /* index of the first image */
    void (*on_step)(void* user, size_t done, size_t total); /* called after each step, or NULL */
    void* user;
} diffx_request;

/* Everything at its default, for one image; size is the caller's sizeof(diffx_request). */
DIFFX_API void diffx_request_init(diffx_request* request, size_t size);
/* Draw images into (num, *shape) floats, of which there is room for capacity. DIFFX_PARITY_ERROR where the golden cases
 * run before it and differ. */
DIFFX_API diffx_status diffx_sample(diffx_sampler* sampler, const diffx_request* request, float* images,
                                    size_t capacity);

typedef struct diffx_finding {
    size_t size;      /* sizeof(diffx_finding) as the library knows it */
    const char* name; /* "step 0, x_next" or "run" */
    int32_t passed;
    int32_t held_by_psnr; /* whether limit is in dB and held by psnr, or a relative error */
    double relative_l2;   /* ||found - expected|| / ||expected|| */
    double max_abs;
    double psnr; /* dB over the range of what was expected; infinite where all is equal */
    double limit;
    double seconds_per_step; /* fastest of some runs */
} diffx_finding;

/* Run the bundle's golden cases and compare them with the recorded results; DIFFX_PARITY_ERROR where any differs. */
DIFFX_API diffx_status diffx_selftest(diffx_sampler* sampler, void (*report)(void* user, const diffx_finding* finding),
                                      void* user);

#ifdef __cplusplus
}
#endif
#endif
