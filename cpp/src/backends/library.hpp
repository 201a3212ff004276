// A runtime's shared library, opened when its backend is asked for: a program starts without the runtimes it does not
// use, needs none of them to link, and says which one is missing.
#pragma once

#include <string>

namespace diffx::core {

class Library {
public:
    /// Open the library that the environment variable names, else the first of names (separated by spaces) that is
    /// found. Throws DIFFX_BACKEND_ERROR, which says what to install.
    Library(const char* backend, const char* variable, const std::string& names, const char* install);
    Library(const Library&) = delete;
    Library& operator=(const Library&) = delete;
    ~Library() = default; // runtimes keep threads and static state, so that none is ever unloaded

    template <typename Function>
    Function* symbol(const char* name) const {
        return reinterpret_cast<Function*>(address(name));
    }
    const std::string& name() const { return name_; }

private:
    void* address(const char* name) const;

    void* handle_ = nullptr;
    std::string backend_;
    std::string name_;
};

} // namespace diffx::core
