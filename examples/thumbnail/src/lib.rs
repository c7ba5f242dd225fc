//! Thumbnails of photographs, by crates from crates.io that know nothing of Sandbar: one decodes, one
//! scales, one encodes. What comes in is not trusted: dimensions are checked before anything is
//! allocated for them, and the memory limit holds whatever the decoder does.

use std::io::Cursor;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use exif::{In, Reader, Tag};
use fast_image_resize::images::Image;
use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer};
use jpeg_encoder::{ColorType, Encoder};
use sandbar_guest::{Context, Output, Schema, TaskError, log, task};
use serde::Deserialize;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Longest edge of a thumbnail where the input does not say, in pixels.
const DEFAULT_EDGE: u16 = 320;
/// Longest edge that may be asked for, in pixels.
const MAX_EDGE: u16 = 2048;
/// JPEG quality where the input does not say.
const DEFAULT_QUALITY: u8 = 82;
/// Pixels of a photograph: 4 bytes each must fit the memory limit beside the decoder's own.
const MAX_PIXELS: usize = 32_000_000;
/// Bytes of a pixel: red, green, blue, and one that is always 255.
const CHANNELS: usize = 4;

/// A photograph, and how large its thumbnail should be.
#[derive(Deserialize, Schema)]
#[serde(deny_unknown_fields)]
struct Input {
    /// The photograph: a JPEG file in base64.
    photo: String,
    /// Longest edge of the thumbnail in pixels, 1 to 2048; 320 if absent. A smaller photograph is not
    /// enlarged.
    edge: Option<u16>,
    /// JPEG quality, 1 to 100; 82 if absent.
    quality: Option<u8>,
}

/// Makes a thumbnail of a JPEG photograph.
///
/// The result is a JPEG file, upright whichever way the camera was held, without the metadata of the
/// photograph (place and time among them).
#[task(limits(memory = "256MiB", timeout = "30s", output = "4MiB"), retry(max_attempts = 1))]
fn thumbnail(ctx: &Context, input: Input) -> Result<Output, TaskError> {
    let edge = input.edge.unwrap_or(DEFAULT_EDGE);
    if edge == 0 || edge > MAX_EDGE {
        return Err(TaskError::fatal(format!("edge must be from 1 to {MAX_EDGE}, not {edge}")));
    }
    let quality = input.quality.unwrap_or(DEFAULT_QUALITY);
    if quality == 0 || quality > 100 {
        return Err(TaskError::fatal(format!("quality must be from 1 to 100, not {quality}")));
    }
    let file = STANDARD.decode(&input.photo).map_err(|e| TaskError::fatal(format!("photo: {e}")))?;
    drop(input);

    let photo = decode(&file)?;
    ctx.progress(1, 3, "decoded");
    let (from, orientation) = ((photo.width, photo.height), orientation(&file));
    let small = upright(&scale(photo, edge)?, orientation);
    ctx.progress(2, 3, "scaled");

    let mut jpeg = Vec::new();
    let (width, height) = (narrow(small.width)?, narrow(small.height)?);
    Encoder::new(&mut jpeg, quality)
        .encode(&small.pixels, width, height, ColorType::Rgba)
        .map_err(TaskError::fatal)?;
    ctx.progress(3, 3, "encoded");
    log::info!(
        orientation, bytes = jpeg.len();
        "{}x{} became {width}x{height}", from.0, from.1
    );
    Ok(Output::new("image/jpeg", jpeg))
}

/// A picture, row by row.
#[derive(Debug, PartialEq)]
struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

fn decode(file: &[u8]) -> Result<Picture, TaskError> {
    let options = DecoderOptions::default().jpeg_set_out_colorspace(ColorSpace::RGBA);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(file), options);
    let wrong =
        |e: zune_jpeg::errors::DecodeErrors| TaskError::fatal(format!("not a JPEG that can be read: {e:?}"));
    decoder.decode_headers().map_err(wrong)?;
    let info = decoder.info().ok_or_else(|| TaskError::fatal("a JPEG without dimensions"))?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    if width * height > MAX_PIXELS {
        return Err(TaskError::fatal(format!("{width}x{height} is more than {MAX_PIXELS} pixels")));
    }
    let pixels = decoder.decode().map_err(wrong)?;
    Ok(Picture { width, height, pixels })
}

/// The photograph, scaled down so that its longest edge is at most `edge`.
fn scale(photo: Picture, edge: u16) -> Result<Picture, TaskError> {
    let longest = photo.width.max(photo.height);
    let edge = usize::from(edge);
    if longest <= edge {
        return Ok(photo);
    }
    let fit = |length: usize| ((length * edge + longest / 2) / longest).max(1);
    let (width, height) = (fit(photo.width), fit(photo.height));
    let source = Image::from_vec_u8(wide(photo.width)?, wide(photo.height)?, photo.pixels, PixelType::U8x4)?;
    let mut target = Image::new(wide(width)?, wide(height)?, PixelType::U8x4);
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::Lanczos3));
    Resizer::new().resize(&source, &mut target, &options)?;
    Ok(Picture { width, height, pixels: target.into_vec() })
}

/// How the camera was held, as EXIF numbers it: 1 to 8, and 1 (upright) where nothing can be read.
fn orientation(file: &[u8]) -> u32 {
    let exif = Reader::new().read_from_container(&mut Cursor::new(file));
    let said = exif.ok().and_then(|exif| exif.get_field(Tag::Orientation, In::PRIMARY)?.value.get_uint(0));
    said.filter(|n| (1..=8).contains(n)).unwrap_or(1)
}

/// The picture turned and mirrored so that what EXIF calls the top left is there.
fn upright(picture: &Picture, orientation: u32) -> Picture {
    let (w, h) = (picture.width, picture.height);
    let (width, height) = if orientation >= 5 { (h, w) } else { (w, h) };
    let mut pixels = Vec::with_capacity(picture.pixels.len());
    for y in 0..height {
        for x in 0..width {
            let (from_x, from_y) = match orientation {
                2 => (w - 1 - x, y),
                3 => (w - 1 - x, h - 1 - y),
                4 => (x, h - 1 - y),
                5 => (y, x),
                6 => (y, h - 1 - x),
                7 => (w - 1 - y, h - 1 - x),
                8 => (w - 1 - y, x),
                _ => (x, y),
            };
            let at = (from_y * w + from_x) * CHANNELS;
            pixels.extend_from_slice(&picture.pixels[at..at + CHANNELS]);
        }
    }
    Picture { width, height, pixels }
}

fn wide(length: usize) -> Result<u32, TaskError> {
    u32::try_from(length).map_err(TaskError::fatal)
}

fn narrow(length: usize) -> Result<u16, TaskError> {
    u16::try_from(length).map_err(TaskError::fatal)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHOTO: &[u8] = include_bytes!("../photo.jpg");

    fn make(photo: &[u8], edge: u16) -> Result<Output, TaskError> {
        let input = Input { photo: STANDARD.encode(photo), edge: Some(edge), quality: None };
        thumbnail(&Context::test().build(), input)
    }

    #[test]
    fn the_longest_edge_is_as_asked_and_the_shape_stays() {
        let made = make(PHOTO, 160).unwrap();
        assert_eq!(made.content_type, "image/jpeg");
        let small = decode(&made.bytes).unwrap();
        assert_eq!((small.width, small.height), (160, 107));
    }

    #[test]
    fn a_photograph_is_never_enlarged() {
        let small = decode(&make(PHOTO, 2048).unwrap().bytes).unwrap();
        assert_eq!((small.width, small.height), (640, 427));
    }

    #[test]
    fn what_is_no_photograph_or_no_size_is_a_fatal_error() {
        for error in [make(b"GIF89a", 10).unwrap_err(), make(&PHOTO[..5000], 0).unwrap_err()] {
            assert!(!error.is_retryable(), "{error:?}");
        }
    }

    #[test]
    fn every_orientation_brings_the_same_corner_to_the_top_left() {
        // The letters a to f, upright: abc over def; and how a camera stores them held each way.
        let stored = ["abcdef", "cbafed", "fedcba", "defabc", "adbecf", "cfbead", "fcebda", "daebfc"];
        let picture = |letters: &str, width: usize, height: usize| Picture {
            width,
            height,
            pixels: letters.bytes().flat_map(|letter| [letter; CHANNELS]).collect(),
        };
        for (orientation, letters) in (1..).zip(stored) {
            let (width, height) = if orientation >= 5 { (2, 3) } else { (3, 2) };
            let turned = upright(&picture(letters, width, height), orientation);
            assert_eq!(turned, picture("abcdef", 3, 2), "orientation {orientation}");
        }
    }
}
