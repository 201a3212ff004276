// The golden cases of a bundle, run on a backend and compared with what PyTorch gave; see diffexport/golden.py.
#pragma once

#include <string>
#include <vector>

#include "backend.hpp"
#include "bundle.hpp"

namespace diffx::core {

/// One comparison; the fields are those of diffx_finding.
struct Finding {
    std::string name;
    bool passed, held_by_psnr;
    double relative_l2, max_abs, psnr, limit, seconds_per_step;
};

/// Run the golden cases of some graphs; each so many times, the fastest of which counts.
std::vector<Finding> selftest(const Bundle& bundle, Network& network, GraphSet graphs, int repeats);

/// Throw DIFFX_PARITY_ERROR, which says how many failed and the worst of them, unless all have passed.
void require_passed(const std::vector<Finding>& findings, const std::string& device);

} // namespace diffx::core
