// JPEG through libjpeg(-turbo), PNG through libpng: the libraries Pillow decodes with, and with its settings, so that
// pixels are the same.
//
// Both report errors by longjmp. Each decoder is therefore a plain function that owns nothing with a destructor: it
// fills a Decoder, whose owner turns `failure` into an exception.
#include "image.h"

#include <sys/stat.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <new>

// After <cstdio>, which it needs and does not include.
#include <jpeglib.h>

// After jpeglib.h.
#include <jerror.h>
#include <png.h>

#include "refuse.h"

namespace vimdeploy {
namespace {

constexpr const char* kTooLarge = "too large";

struct Decoder {
  const std::uint8_t* bytes;
  std::size_t size;
  Image* image;
  std::jmp_buf escape;
  char failure[JMSG_LENGTH_MAX] = "";
};

// False, with `failure` set, for a size that is refused or does not fit in memory. Keeps bad_alloc out of C frames.
bool Allocate(Decoder* decoder, std::uint64_t width, std::uint64_t height) {
  decoder->image->width = static_cast<int>(width);
  decoder->image->height = static_cast<int>(height);
  if (width * height > static_cast<std::uint64_t>(kMaxPixels)) {
    std::strcpy(decoder->failure, kTooLarge);
    return false;
  }
  try {
    decoder->image->pixels.resize(static_cast<std::size_t>(width * height * 3));
  } catch (const std::bad_alloc&) {
    std::strcpy(decoder->failure, "it does not fit in memory");
    return false;
  }
  return true;
}

// ---- JPEG

struct JpegErrors {
  jpeg_error_mgr manager;  // first: libjpeg hands back a pointer to it
  Decoder* decoder;
};

[[noreturn]] void OnJpegError(j_common_ptr info) {
  auto* const errors = reinterpret_cast<JpegErrors*>(info->err);
  errors->manager.format_message(info, errors->decoder->failure);
  std::longjmp(errors->decoder->escape, 1);
}

// libjpeg takes the end of the file for a warning and makes up the rest of the picture.
void OnJpegMessage(j_common_ptr info, int level) {
  if (level >= 0 || info->err->msg_code != JWRN_JPEG_EOF) return;
  auto* const errors = reinterpret_cast<JpegErrors*>(info->err);
  std::strcpy(errors->decoder->failure, "the file is truncated");
  std::longjmp(errors->decoder->escape, 1);
}

// a * b / 255, rounded.
std::uint8_t Scaled(unsigned a, unsigned b) { return static_cast<std::uint8_t>((a * b * 2 + 255) / 510); }

// Ink to light: each of cyan, magenta and yellow takes away its share of what black leaves.
void CmykToRgb(const std::uint8_t* cmyk, bool inverted, int width, std::uint8_t* rgb) {
  for (int x = 0; x < width; ++x, cmyk += 4, rgb += 3) {
    const auto ink = [&](int channel) { return inverted ? 255u - cmyk[channel] : unsigned{cmyk[channel]}; };
    const unsigned light = 255 - ink(3);
    for (int channel = 0; channel < 3; ++channel)
      rgb[channel] = static_cast<std::uint8_t>(light - Scaled(ink(channel), light));
  }
}

void DecodeJpeg(Decoder* decoder) {
  jpeg_decompress_struct info;
  JpegErrors errors;
  info.err = jpeg_std_error(&errors.manager);
  errors.manager.error_exit = OnJpegError;
  errors.manager.emit_message = OnJpegMessage;
  errors.decoder = decoder;
  jpeg_create_decompress(&info);
  if (setjmp(decoder->escape) == 0) {
    jpeg_mem_src(&info, decoder->bytes, static_cast<unsigned long>(decoder->size));
    jpeg_read_header(&info, TRUE);
    const bool cmyk = info.num_components == 4;
    info.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    if (Allocate(decoder, info.image_width, info.image_height)) {
      const bool inverted = info.saw_Adobe_marker;  // Adobe's programs store CMYK inverted
      jpeg_start_decompress(&info);
      const std::size_t stride = static_cast<std::size_t>(info.output_width) * 3;
      // From libjpeg's own pool, freed with it: a vector would be leaked by longjmp.
      JSAMPARRAY row = info.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&info), JPOOL_IMAGE,
                                              info.output_width * static_cast<unsigned>(info.output_components), 1);
      while (info.output_scanline < info.output_height) {
        std::uint8_t* const to = decoder->image->pixels.data() + info.output_scanline * stride;
        jpeg_read_scanlines(&info, row, 1);
        if (cmyk) {
          CmykToRgb(row[0], inverted, static_cast<int>(info.output_width), to);
        } else {
          std::memcpy(to, row[0], stride);
        }
      }
      jpeg_finish_decompress(&info);
    }
  }
  jpeg_destroy_decompress(&info);
}

// ---- PNG

[[noreturn]] void OnPngError(png_structp png, png_const_charp message) {
  auto* const decoder = static_cast<Decoder*>(png_get_error_ptr(png));
  std::snprintf(decoder->failure, sizeof decoder->failure, "%s", message);
  std::longjmp(decoder->escape, 1);
}

void OnPngWarning(png_structp, png_const_charp) {}

void ReadPngBytes(png_structp png, png_bytep to, std::size_t count) {
  auto* const decoder = static_cast<Decoder*>(png_get_io_ptr(png));
  if (count > decoder->size) png_error(png, "the file is truncated");
  std::memcpy(to, decoder->bytes, count);
  decoder->bytes += count;
  decoder->size -= count;
}

// What a row of samples means.
struct PngFormat {
  int channels;
  int bits;  // of a sample in the file; one row entry a sample whatever it is
  bool wide_grey;
  png_colorp palette;
  int palette_size;
};

void PngRowToRgb(const std::uint8_t* row, const PngFormat& format, std::size_t width, std::uint8_t* rgb) {
  for (std::size_t x = 0; x < width; ++x, rgb += 3) {
    if (format.palette != nullptr) {
      const png_color black{};
      const png_color& colour = row[x] < format.palette_size ? format.palette[row[x]] : black;
      rgb[0] = colour.red;
      rgb[1] = colour.green;
      rgb[2] = colour.blue;
    } else if (format.channels >= 3) {
      std::memcpy(rgb, row + x * static_cast<std::size_t>(format.channels), 3);
    } else {
      unsigned grey = row[x * static_cast<std::size_t>(format.channels)];
      if (format.wide_grey) {
        grey = (unsigned{row[2 * x]} << 8 | row[2 * x + 1]);
        grey = (grey + 128) / 257;
      } else if (format.bits < 8) {
        grey = grey * 255 / ((1u << format.bits) - 1);
      }
      std::memset(rgb, static_cast<int>(grey), 3);
    }
  }
}

void DecodePng(Decoder* decoder) {
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, decoder, OnPngError, OnPngWarning);
  png_infop info = png != nullptr ? png_create_info_struct(png) : nullptr;
  if (info == nullptr) {
    std::strcpy(decoder->failure, "libpng could not start");
    png_destroy_read_struct(&png, nullptr, nullptr);
    return;
  }
  // Freed after a longjmp too, so not in registers.
  png_bytep volatile samples = nullptr;
  if (setjmp(decoder->escape) == 0) {
    png_set_read_fn(png, decoder, ReadPngBytes);
    png_set_user_limits(png, 0x7fffffff, 0x7fffffff);  // ours is Allocate's
    png_read_info(png, info);
    const png_uint_32 width = png_get_image_width(png, info);
    const png_uint_32 height = png_get_image_height(png, info);
    const int colour = png_get_color_type(png, info);
    PngFormat format{};
    format.bits = png_get_bit_depth(png, info);
    format.wide_grey = colour == PNG_COLOR_TYPE_GRAY && format.bits == 16;
    if (colour == PNG_COLOR_TYPE_PALETTE) png_get_PLTE(png, info, &format.palette, &format.palette_size);
    png_set_packing(png);                          // a byte for each sample of less
    if (!format.wide_grey) png_set_strip_16(png);  // the upper byte, as Pillow takes it
    const int passes = png_set_interlace_handling(png);
    png_read_update_info(png, info);
    format.channels = png_get_channels(png, info);
    if (Allocate(decoder, width, height)) {
      const std::size_t stride = png_get_rowbytes(png, info);
      const std::size_t rows = passes > 1 ? height : 1;  // interlaced rows are completed pass by pass
      samples = static_cast<png_bytep>(png_malloc(png, stride * rows));
      std::memset(samples, 0, stride * rows);
      for (int pass = 0; pass < passes; ++pass) {
        for (std::size_t y = 0; y < height; ++y) {
          png_bytep const row = samples + (passes > 1 ? y * stride : 0);
          png_read_row(png, row, nullptr);
          if (pass + 1 == passes) PngRowToRgb(row, format, width, decoder->image->pixels.data() + y * width * 3);
        }
      }
      png_read_end(png, nullptr);
    }
  }
  png_free(png, samples);
  png_destroy_read_struct(&png, &info, nullptr);
}

bool StartsWith(const std::uint8_t* bytes, std::size_t size, const char* magic, std::size_t length) {
  return size >= length && std::memcmp(bytes, magic, length) == 0;
}

}  // namespace

Image Image::Decode(const void* bytes, std::size_t size, const std::string& name) {
  Image image;
  Decoder decoder{static_cast<const std::uint8_t*>(bytes), size, &image, {}, ""};
  if (StartsWith(decoder.bytes, size, "\xFF\xD8\xFF", 3)) {
    DecodeJpeg(&decoder);
  } else if (StartsWith(decoder.bytes, size, "\x89PNG\r\n\x1A\n", 8)) {
    DecodePng(&decoder);
  } else {
    RefuseInput(name + " is neither a JPEG nor a PNG file", "convert it, or decode it yourself and fill in an Image");
  }
  if (decoder.failure == std::string(kTooLarge)) {
    RefuseInput(name + " is refused: " + std::to_string(image.width) + "x" + std::to_string(image.height) +
                    " pixels are more than " + std::to_string(kMaxPixels),
                "scale it down first");
  }
  if (decoder.failure[0] != '\0') RefuseInput(name + " is damaged: " + decoder.failure, "replace or remove it");
  return image;
}

Image Image::Read(const std::string& path) {
  struct stat status;
  if (stat(path.c_str(), &status) != 0) RefuseInput(path + " does not exist", "check the path");
  if (S_ISDIR(status.st_mode)) RefuseInput(path + " is a folder, not an image", "name a file in it");
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (!file) RefuseInput(path + " cannot be read", "check its permissions");
  return Decode(bytes.data(), bytes.size(), path);
}

}  // namespace vimdeploy
