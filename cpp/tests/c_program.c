/* The C interface from C: what works, and that every refusal is a status and a message. Prints the images as text. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "diffx.h"

static void expect(diffx_status found, diffx_status expected, const char* message) {
    if (found != expected || (message != NULL && strstr(diffx_last_error(), message) == NULL)) {
        fprintf(stderr, "got status %d (%s), expected %d (%s)\n", (int)found, diffx_last_error(), (int)expected,
                message ? message : "");
        exit(1);
    }
}

static void count(void* user, size_t done, size_t total) {
    (void)total;
    *(size_t*)user = done;
}

static void report(void* user, const diffx_finding* finding) {
    if (finding->size >= sizeof *finding && finding->passed && finding->seconds_per_step > 0) ++*(size_t*)user;
}

int main(int words, char** word) {
    diffx_bundle* bundle = NULL;
    diffx_sampler* sampler = NULL;
    diffx_request request;
    int64_t shape[3];
    if (words != 2) return 2;

    expect(diffx_bundle_open("/nowhere", &bundle), DIFFX_BUNDLE_ERROR, "no such folder");
    expect(diffx_bundle_open(NULL, &bundle), DIFFX_SHAPE_ERROR, "path: got NULL");
    expect(diffx_bundle_open(word[1], NULL), DIFFX_SHAPE_ERROR, "bundle: got NULL");
    diffx_bundle_free(NULL);
    diffx_sampler_free(NULL);

    expect(diffx_bundle_open(word[1], &bundle), DIFFX_OK, NULL);
    expect(diffx_sampler_open(bundle, "nonsense", NULL, &sampler), DIFFX_BACKEND_ERROR,
           "known: ort, ort-cuda, openvino");
    diffx_options options = {.size = sizeof options, .threads = 1, .selftest = 1};
    expect(diffx_sampler_open(bundle, "ort", &options, &sampler), DIFFX_OK, NULL);
    expect(strcmp(diffx_sampler_device(sampler), "CPU") == 0 ? DIFFX_OK : DIFFX_INTERNAL_ERROR, DIFFX_OK, NULL);

    const size_t rank = diffx_bundle_shape(bundle, shape);
    size_t size = 1, seen = 0, passed = 0;
    for (size_t k = 0; k < rank; ++k) size *= (size_t)shape[k];
    float* images = malloc(3 * size * sizeof *images);
    const int64_t labels[] = {3, 1, 4};
    diffx_request_init(&request, sizeof request);
    request.labels = labels, request.num_labels = request.num = 3;
    request.sampler = "ddpm", request.steps = 10, request.seed = 7, request.guidance_scale = 2.0, request.batch = 3;
    request.on_step = count, request.user = &seen;
    expect(diffx_sample(sampler, &request, images, 3 * size - 1), DIFFX_SHAPE_ERROR, "there is room for");
    expect(diffx_sample(sampler, &request, images, 3 * size), DIFFX_OK, NULL);
    expect(seen == 10 ? DIFFX_OK : DIFFX_INTERNAL_ERROR, DIFFX_OK, NULL);
    expect(diffx_selftest(sampler, report, &passed), DIFFX_OK, NULL);
    expect(passed >= 7 ? DIFFX_OK : DIFFX_INTERNAL_ERROR, DIFFX_OK, NULL);
    for (size_t k = 0; k < 3 * size; ++k) printf("%.9g\n", (double)images[k]);

    diffx_request wrong = request;
    wrong.steps = 13;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_PLAN_ERROR, "--plan ddpm:13");
    wrong = request, wrong.num = 2;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_SHAPE_ERROR, "give one of the two");
    wrong = request, wrong.num = 0;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_SHAPE_ERROR, "num 0");
    wrong = request, wrong.batch = -1;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_SHAPE_ERROR, "batch -1");
    wrong = request, wrong.guidance_scale = INFINITY;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_PLAN_ERROR, "finite");
    const int64_t outside[] = {0, 1, 1000};
    wrong = request, wrong.labels = outside;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_SHAPE_ERROR, "label 1000");

    /* A caller of an older header, who knows fewer fields, gets the defaults of the others. */
    wrong = request, wrong.size = offsetof(diffx_request, on_step), seen = 0;
    expect(diffx_sample(sampler, &wrong, images, 3 * size), DIFFX_OK, NULL);
    expect(seen == 0 ? DIFFX_OK : DIFFX_INTERNAL_ERROR, DIFFX_OK, NULL);

    diffx_bundle_free(bundle); /* before the sampler: any order */
    expect(diffx_sample(sampler, &request, images, 3 * size), DIFFX_OK, NULL);
    diffx_sampler_free(sampler);
    free(images);
    return 0;
}
