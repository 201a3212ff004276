// The golden cases of a bundle, run on a backend and compared with what PyTorch gave; see diffexport/golden.py.
#pragma once

#include <string>
#include <vector>

#include "sampler.hpp"

namespace diffx::core {

/// One comparison; the fields are those of diffx_finding.
struct Finding {
    std::string name;
    bool passed, held_by_psnr;
    double relative_l2, max_abs, psnr, limit, seconds_per_step;
};

std::vector<Finding> selftest(Sampler& sampler);

} // namespace diffx::core
