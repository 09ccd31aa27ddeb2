"""Numba kernels of the renderer: skinning, projection, a z-buffer, and the averaging that smooths edges."""

import math

import numba
import numpy as np

EMPTY_DEPTH = np.float32(1e9)


@numba.njit(cache=True, nogil=True)
def vertex_normals(vertices, faces):
    """Unit normals (v, 3) float32: the mean of the normals of the faces by area; 0 for vertices of no face."""
    normals = np.zeros_like(vertices)
    for f in range(faces.shape[0]):
        i, j, k = faces[f, 0], faces[f, 1], faces[f, 2]
        ax, ay, az = vertices[j, 0] - vertices[i, 0], vertices[j, 1] - vertices[i, 1], vertices[j, 2] - vertices[i, 2]
        bx, by, bz = vertices[k, 0] - vertices[i, 0], vertices[k, 1] - vertices[i, 1], vertices[k, 2] - vertices[i, 2]
        for corner in (i, j, k):
            normals[corner, 0] += ay * bz - az * by
            normals[corner, 1] += az * bx - ax * bz
            normals[corner, 2] += ax * by - ay * bx
    for v in range(normals.shape[0]):
        length = math.sqrt(normals[v, 0] ** 2 + normals[v, 1] ** 2 + normals[v, 2] ** 2)
        if length > 0:
            normals[v] /= length
    return normals


@numba.njit(cache=True, nogil=True, fastmath=True)
def skin_and_project(
    vertices, normals, joint_indices, joint_weights, transforms, distance, affine, light, ambient, screen, shades
):
    """Write screen (v, 3), x, y in pixels and depth in metres, and shades (v,), the brightness of posed vertices.

    Args:
        transforms: (j, 3, 4) rest -> camera axes (x right, y away, z up), metres from the point looked at.
        distance: metres from the camera to that point.
        affine: (2, 3) metres right and down at that point -> pixels.
        light: (3,) direction towards the light in camera axes, of length 1; `ambient` falls from everywhere.
    """
    for v in range(vertices.shape[0]):
        x, y, z = vertices[v, 0], vertices[v, 1], vertices[v, 2]
        a, b, c = normals[v, 0], normals[v, 1], normals[v, 2]
        px = py = pz = nx = ny = nz = np.float32(0.0)
        for k in range(4):
            w = joint_weights[v, k]
            if w == 0.0:
                break
            m = transforms[joint_indices[v, k]]
            px += w * (m[0, 0] * x + m[0, 1] * y + m[0, 2] * z + m[0, 3])
            py += w * (m[1, 0] * x + m[1, 1] * y + m[1, 2] * z + m[1, 3])
            pz += w * (m[2, 0] * x + m[2, 1] * y + m[2, 2] * z + m[2, 3])
            nx += w * (m[0, 0] * a + m[0, 1] * b + m[0, 2] * c)
            ny += w * (m[1, 0] * a + m[1, 1] * b + m[1, 2] * c)
            nz += w * (m[2, 0] * a + m[2, 1] * b + m[2, 2] * c)
        depth = py + distance
        scale = distance / depth
        right, down = px * scale, -pz * scale
        screen[v, 0] = affine[0, 0] * right + affine[0, 1] * down + affine[0, 2]
        screen[v, 1] = affine[1, 0] * right + affine[1, 1] * down + affine[1, 2]
        screen[v, 2] = depth
        length = math.sqrt(nx * nx + ny * ny + nz * nz) + np.float32(1e-9)
        cosine = (nx * light[0] + ny * light[1] + nz * light[2]) / length
        # Half-Lambert: soft light, with no hard border between lit and unlit.
        half = np.float32(0.5) * cosine + np.float32(0.5)
        shades[v] = ambient + (np.float32(1.0) - ambient) * half * half * np.float32(1.5)


@numba.njit(cache=True, nogil=True, fastmath=True)
def rasterize(screen, shades, faces, corner_uv, parts, two_sided, texture, color, depth):
    """Draw triangles with a z-buffer: color (h, w, 3) is written where the person is, depth (h, w) is in metres.

    `screen` and `shades` are of `skin_and_project`, the others of a `data.people.bodies.Person`; u wraps round.
    """
    height, width = depth.shape
    size = np.float32(texture.shape[1])
    last = texture.shape[1] - 1
    for f in range(faces.shape[0]):
        i0, i1, i2 = faces[f, 0], faces[f, 1], faces[f, 2]
        x0, y0, z0 = screen[i0, 0], screen[i0, 1], screen[i0, 2]
        x1, y1, z1 = screen[i1, 0], screen[i1, 1], screen[i1, 2]
        x2, y2, z2 = screen[i2, 0], screen[i2, 1], screen[i2, 2]
        part = parts[f]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        # y points down, so a triangle that is counter-clockwise to the eye has a negative area.
        if area > 0.0 and not two_sided[part]:
            continue
        if abs(area) < 1e-9:
            continue
        left = max(0, int(math.ceil(min(x0, x1, x2))))
        right = min(width - 1, int(math.floor(max(x0, x1, x2))))
        top = max(0, int(math.ceil(min(y0, y1, y2))))
        bottom = min(height - 1, int(math.floor(max(y0, y1, y2))))
        if left > right or top > bottom:
            continue
        inverse = np.float32(1.0) / area
        for y in range(top, bottom + 1):
            for x in range(left, right + 1):
                # float32 throughout: an integer in these sums would turn them into float64.
                qx, qy = np.float32(x), np.float32(y)
                w0 = ((x1 - qx) * (y2 - qy) - (x2 - qx) * (y1 - qy)) * inverse
                w1 = ((x2 - qx) * (y0 - qy) - (x0 - qx) * (y2 - qy)) * inverse
                w2 = np.float32(1.0) - w0 - w1
                if w0 < 0.0 or w1 < 0.0 or w2 < 0.0:
                    continue
                z = w0 * z0 + w1 * z1 + w2 * z2
                if z >= depth[y, x]:
                    continue
                depth[y, x] = z
                u = w0 * corner_uv[f, 0, 0] + w1 * corner_uv[f, 1, 0] + w2 * corner_uv[f, 2, 0]
                v = w0 * corner_uv[f, 0, 1] + w1 * corner_uv[f, 1, 1] + w2 * corner_uv[f, 2, 1]
                s = (u - math.floor(u)) * size - np.float32(0.5)
                t = min(max(v, np.float32(0.0)), np.float32(1.0)) * size - np.float32(0.5)
                s0, t0 = int(math.floor(s)), int(math.floor(t))
                ds, dt = s - np.float32(s0), t - np.float32(t0)
                es, et = np.float32(1.0) - ds, np.float32(1.0) - dt
                s1 = 0 if s0 >= last else s0 + 1
                s0 = last if s0 < 0 else s0
                t1 = min(t0 + 1, last)
                t0 = max(t0, 0)
                shade = w0 * shades[i0] + w1 * shades[i1] + w2 * shades[i2]
                for channel in range(3):
                    upper = texture[part, t0, s0, channel] * es + texture[part, t0, s1, channel] * ds
                    lower = texture[part, t1, s0, channel] * es + texture[part, t1, s1, channel] * ds
                    color[y, x, channel] = (upper * et + lower * dt) * shade


@numba.njit(cache=True, nogil=True)
def resolve(color, depth, factor, image, mask):
    """Average `factor` x `factor` samples of `rasterize` over the image (h, w, 3) uint8 below.

    The mask (h, w) bool is written: at least half of a pixel's samples are the person's.
    """
    height, width = mask.shape
    samples = factor * factor
    for y in range(height):
        for x in range(width):
            red = green = blue = np.float32(0.0)
            count = 0
            for i in range(y * factor, (y + 1) * factor):
                for j in range(x * factor, (x + 1) * factor):
                    if depth[i, j] < EMPTY_DEPTH:
                        count += 1
                        red += min(color[i, j, 0], np.float32(255.0))
                        green += min(color[i, j, 1], np.float32(255.0))
                        blue += min(color[i, j, 2], np.float32(255.0))
            mask[y, x] = 2 * count >= samples
            if count > 0:
                rest = samples - count
                image[y, x, 0] = np.uint8((red + rest * image[y, x, 0]) / samples + 0.5)
                image[y, x, 1] = np.uint8((green + rest * image[y, x, 1]) / samples + 0.5)
                image[y, x, 2] = np.uint8((blue + rest * image[y, x, 2]) / samples + 0.5)
