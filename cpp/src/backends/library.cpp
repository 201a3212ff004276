#include "backends/library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <sstream>

#include "error.hpp"

namespace diffx::core {

Library::Library(const char* backend, const char* variable, const std::string& names, const char* install)
    : backend_(backend) {
    const char* given = std::getenv(variable);
    std::istringstream candidates(given != nullptr && *given != '\0' ? std::string(given) : names);
    std::string problems;
    while (candidates >> name_) {
        handle_ = dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle_ != nullptr) return;
        problems.append(problems.empty() ? "" : "; ").append(dlerror());
    }
    throw error(DIFFX_BACKEND_ERROR, "backend '", backend, "': its library cannot be opened (", problems, "); ",
                install, ", or name the file in ", variable);
}

void* Library::address(const char* name) const {
    void* found = dlsym(handle_, name);
    if (found == nullptr)
        throw error(DIFFX_BACKEND_ERROR, "backend '", backend_, "': ", name_, " has no ", name,
                    "; it is of another version");
    return found;
}

} // namespace diffx::core
