// SHA-256: the standard's examples, a million letters, and every length around a block against the same bytes in
// pieces.
#include <doctest/doctest.h>

#include <string>

#include "sha256.hpp"

using diffx::core::Sha256;

namespace {

std::string digest(const std::string& text, std::size_t piece = std::string::npos, bool portable = false) {
    Sha256 hash(portable);
    for (std::size_t start = 0; start < text.size(); start += std::min(piece, text.size()))
        hash.update(std::as_bytes(std::span(text).subspan(start, std::min(piece, text.size() - start))));
    return hash.digest();
}

} // namespace

TEST_CASE("the standard's examples") {
    CHECK(digest("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    CHECK(digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    CHECK(digest("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq") ==
          "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    CHECK(digest(
              "abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrst"
              "nopqrstu") == "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
    CHECK(digest(std::string(1'000'000, 'a')) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_CASE("the processor's instructions give what portable code gives") {
    std::string text;
    for (int k = 0; k < 1000; ++k) text += static_cast<char>(k * k % 251);
    for (std::size_t length = 0; length < text.size(); length += 37) {
        const std::string part = text.substr(0, length);
        CHECK(digest(part) == digest(part, 100, true));
    }
    CHECK(digest("abc", 3, true) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("pieces of any size give the digest of the whole") {
    for (std::size_t length = 1; length < 200; ++length) {
        const std::string text(length, 'x');
        for (const std::size_t piece : {1U, 7U, 63U, 64U, 65U}) CHECK(digest(text, piece) == digest(text));
    }
}
