// The one exception of the library; the C interface turns it into a status and a message.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

#include "diffx.h"

namespace diffx::core {

class Error : public std::runtime_error {
public:
    Error(diffx_status kind, const std::string& message) : std::runtime_error(message), status(kind) {}
    diffx_status status;
};

/// An error whose message is its arguments written one after the other.
template <typename... Parts>
Error error(diffx_status status, const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    return {status, message.str()};
}

} // namespace diffx::core
