"""Distances against published ones and two other libraries; neighbours against brute force and a ball tree."""

from __future__ import annotations

import numpy as np
import pyproj
import pytest
from scipy.spatial.distance import cdist
from sklearn.neighbors import BallTree

from cvft.errors import ConfigError, DataError
from pipeline import geography
from pipeline.geography import (
    EARTH_RADIUS_M,
    NeighbourTree,
    extent,
    from_utm,
    geocentric_m,
    haversine_m,
    utm_epsg,
    utm_m,
)

# Places in degrees and the length of the geodesic between them, each as published.
KNOWN = {
    # Geocentric Datum of Australia, technical manual, Vincenty's example (GRS80, which is WGS84 to 0.1 mm)
    "Flinders Peak - Buninyong": (
        (-(37 + 57 / 60 + 3.72030 / 3600), 144 + 25 / 60 + 29.52440 / 3600),
        (-(37 + 39 / 60 + 10.15610 / 3600), 143 + 55 / 60 + 35.38390 / 3600),
        54_972.271,
    ),
    # GeographicLib: the first line of GeodTest.dat, the examples of GeodSolve and of its Python documentation
    "GeodTest 1": ((36.530042355041, 0.0), (-48.164270779097768864, 5.762344694676510456), 9_398_502.0434687),
    "New York JFK - London LHR": ((40.6, -73.8), (51.6, -0.5), 5_551_759.400),
    "Wellington - Salamanca": ((-41.32, 174.81), (40.96, -5.50), 19_959_679.267),
    # WGS84's meridian quadrant and an arc of one degree along its equator, 2 pi a / 360
    "equator - pole": ((0.0, 17.0), (90.0, 80.0), 10_001_965.729),
    "a degree of the equator across the antimeridian": ((0.0, 179.5), (0.0, -179.5), 111_319.491),
}


def _scattered(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return latitudes and longitudes, evenly over the earth."""
    generator = np.random.default_rng(seed)
    return np.degrees(np.arcsin(generator.uniform(-1, 1, num))), generator.uniform(-180, 180, num)


def _city(num: int, *, latitude_deg: float = 60.2, longitude_deg: float = 24.9, seed: int = 0) -> np.ndarray:
    """Return [num, 2] degrees within some ten kilometres."""
    generator = np.random.default_rng(seed)
    return np.array([latitude_deg, longitude_deg]) + generator.uniform(-0.05, 0.05, (num, 2))


def _arc_m(chord_m: float) -> float:
    return 2 * EARTH_RADIUS_M * np.arcsin(chord_m / (2 * EARTH_RADIUS_M))


class TestDistances:
    @pytest.mark.parametrize("name", KNOWN)
    def test_haversine_is_right_to_the_earths_flattening(self, name):
        first, second, expected_m = KNOWN[name]
        assert haversine_m(*first, *second) == pytest.approx(expected_m, rel=0.0056)
        assert pyproj.Geod(ellps="WGS84").inv(*first[::-1], *second[::-1])[2] == pytest.approx(expected_m, abs=0.001)

    def test_degrees_taken_for_radians_would_be_noticed(self):
        for (latitude1, longitude1), (latitude2, longitude2), expected_m in KNOWN.values():
            # the mistake of the most used script for CVUSA: sines of degrees
            half = np.sin((latitude2 - latitude1) / 2) ** 2
            half += np.cos(latitude1) * np.cos(latitude2) * np.sin((longitude2 - longitude1) / 2) ** 2
            mistaken_m = 2 * EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(half, 0, 1)))
            assert mistaken_m != pytest.approx(expected_m, rel=0.05)

    def test_haversine_agrees_with_scikit_learn_everywhere(self):
        latitude, longitude = _scattered(60)
        metrics = pytest.importorskip("sklearn.metrics.pairwise")
        expected = EARTH_RADIUS_M * metrics.haversine_distances(np.radians(np.stack([latitude, longitude], axis=1)))
        found = haversine_m(latitude[:, None], longitude[:, None], latitude, longitude)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-6)

    def test_haversine_of_antipodes_and_of_one_point_is_half_the_circle_and_nothing(self):
        latitude, longitude = _scattered(100)
        antipodes = haversine_m(latitude, longitude, -latitude, longitude + 180)
        np.testing.assert_allclose(antipodes, np.pi * EARTH_RADIUS_M, rtol=1e-7)
        assert (haversine_m(latitude, longitude, latitude, longitude + 360) < 1e-6).all()

    def test_geocentric_positions_are_pyprojs(self):
        latitude, longitude = _scattered(500)
        to_geocentric = pyproj.Transformer.from_crs(4979, 4978, always_xy=True)
        expected = np.stack(to_geocentric.transform(longitude, latitude, np.zeros(500)), axis=1)
        np.testing.assert_allclose(geocentric_m(latitude, longitude), expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("latitude_deg", [0.0, 35.3, -60.2, 89.99, 90.0])
    def test_straight_lines_are_geodesics_but_for_the_documented_shortening(self, latitude_deg):
        geodesic = pyproj.Geod(ellps="WGS84")
        for distance_m in (0.01, 5.0, 25.0, 5_000.0, 100_000.0):
            for azimuth_deg in (0, 77, 180, 290):
                longitude, latitude, _ = geodesic.fwd(179.9999, latitude_deg, azimuth_deg, distance_m)
                found_m = np.linalg.norm(
                    geocentric_m(latitude, longitude) - geocentric_m(latitude_deg, 179.9999), axis=-1
                )
                shortening_m = distance_m**3 / (24 * EARTH_RADIUS_M**2)
                assert found_m == pytest.approx(distance_m - shortening_m, abs=1e-8 + 0.02 * shortening_m)

    def test_straight_line_of_the_known_geodesic_is_right_to_a_centimetre(self):
        first, second, expected_m = KNOWN["Flinders Peak - Buninyong"]
        chord_m = np.linalg.norm(geocentric_m(*first) - geocentric_m(*second))
        assert _arc_m(chord_m) == pytest.approx(expected_m, abs=0.01)

    def test_unknown_coordinates_give_nan_in_the_whole_row(self):
        found = geocentric_m([1.0, np.nan, 1.0, np.nan], [2.0, 2.0, np.nan, np.nan])
        assert np.isnan(found).all(axis=1).tolist() == [False, True, True, True]
        assert not np.isnan(found[0]).any()
        assert np.isnan(haversine_m(1.0, np.nan, 1.0, 2.0))

    @pytest.mark.parametrize(("latitude", "longitude"), [(90.001, 0.0), (-91.0, 0.0), (0.0, np.inf), (-np.inf, 0.0)])
    def test_angles_out_of_range_are_refused_and_named(self, latitude, longitude):
        with pytest.raises(DataError, match="of point 1 is no angle in degrees"):
            geocentric_m([0.0, latitude], [0.0, longitude])
        with pytest.raises(DataError, match="is no angle in degrees"):
            haversine_m(0.0, 0.0, latitude, longitude)


class TestExtent:
    def test_box_holds_all_points_and_its_sides_are_distances(self):
        places = _city(100)
        box = extent(*places.T)
        assert (box.south_deg, box.north_deg) == (places[:, 0].min(), places[:, 0].max())
        assert (box.west_deg, box.east_deg) == pytest.approx((places[:, 1].min(), places[:, 1].max()), abs=1e-12)
        middle_deg = (box.south_deg + box.north_deg) / 2
        assert box.width_m == pytest.approx(haversine_m(middle_deg, box.west_deg, middle_deg, box.east_deg), rel=1e-5)
        assert box.height_m == pytest.approx(haversine_m(box.south_deg, 0.0, box.north_deg, 0.0))

    def test_box_across_the_antimeridian_is_narrow(self):
        box = extent(np.array([0.0, 0.0, 1.0, np.nan]), np.array([179.5, -179.0, -179.5, 0.0]))
        assert (box.west_deg, box.east_deg) == (179.5, -179.0)
        assert box.width_m == pytest.approx(1.5 * 111_195, rel=1e-3)

    def test_box_of_one_point_is_a_point_and_of_none_is_none(self):
        box = extent(np.array([1.0]), np.array([2.0]))
        assert (box.south_deg, box.west_deg, box.north_deg, box.east_deg) == (1.0, 2.0, 1.0, 2.0)
        assert (box.height_m, box.width_m) == (0.0, 0.0)
        assert extent(np.array([np.nan, 1.0]), np.array([1.0, np.nan])) is None


class TestUtm:
    def test_canberra_lies_where_the_maps_have_it(self):
        # Parliament House on a 55H map sheet: zone 55 south, about 693 km east and 6,090 km north
        epsg = utm_epsg(-35.3082, 149.1244)
        assert epsg == 32755
        east, north = utm_m(-35.3082, 149.1244, epsg=epsg)
        assert east == pytest.approx(693_150, abs=300)
        assert north == pytest.approx(6_090_950, abs=300)

    @pytest.mark.parametrize(
        ("latitude_deg", "longitude_deg", "epsg"),
        [
            ([60.2], [24.9], 32635),
            ([-33.9], [151.2], 32756),
            ([0.0], [-180.0], 32601),
            ([1.0], [179.999], 32660),
            ([10.0, 10.0], [179.9, -179.7], 32601),  # the mean of the longitudes would be 0.1
            ([48.0, np.nan, 48.0], [11.0, 170.0, 11.2], 32632),
        ],
    )
    def test_zone_is_that_of_the_middle_of_the_points(self, latitude_deg, longitude_deg, epsg):
        assert utm_epsg(latitude_deg, longitude_deg) == epsg

    def test_there_and_back_is_the_same_place(self):
        places = _city(200, latitude_deg=-35.3, longitude_deg=149.1)
        back = from_utm(*utm_m(*places.T, epsg=32755).T, epsg=32755)
        np.testing.assert_allclose(back, places, rtol=0, atol=1e-9)

    def test_distances_on_the_plane_are_those_of_geodesics_to_a_thousandth(self):
        places = _city(40, latitude_deg=-35.3, longitude_deg=149.1)
        plane_m = utm_m(*places.T, epsg=32755)
        geodesic_m = [pyproj.Geod(ellps="WGS84").inv(*places[0, ::-1], *place[::-1])[2] for place in places]
        np.testing.assert_allclose(np.linalg.norm(plane_m - plane_m[0], axis=1), geodesic_m, rtol=1e-3)

    def test_unknown_places_stay_unknown(self):
        plane_m = utm_m([-35.3, np.nan], [149.1, 149.1], epsg=32755)
        assert np.isnan(plane_m[1]).all()
        assert np.isfinite(plane_m[0]).all()
        assert np.isnan(from_utm([np.nan], [6e6], epsg=32755)).all()
        with pytest.raises(DataError, match="no UTM zone can be told"):
            utm_epsg([np.nan], [np.nan])

    @pytest.mark.parametrize(("epsg", "words"), [(4326, "WGS 84.* is no projection"), (1, "names no coordinate")])
    def test_other_coordinate_systems_are_refused(self, epsg, words):
        with pytest.raises(DataError, match=words):
            utm_m(0.0, 0.0, epsg=epsg)


class TestNeighbours:
    def test_nearest_agree_with_a_ball_tree_of_haversines(self):
        places = _city(400)
        found = NeighbourTree(geocentric_m(*places.T)).nearest_others(10)
        distance, index = BallTree(np.radians(places), metric="haversine").query(np.radians(places), k=11)
        # Where the sphere and the ellipsoid order two neighbours differently, they are equally near to 0.6 %.
        swapped = found.index != index[:, 1:]
        assert swapped.mean() < 0.02
        np.testing.assert_allclose(found.distance_m, distance[:, 1:] * EARTH_RADIUS_M, rtol=0.006)

    def test_degrees_in_place_of_radians_would_find_other_neighbours(self):
        places = np.random.default_rng(0).uniform((30, -120), (48, -75), (1500, 2))  # as wide as CVUSA
        truth = NeighbourTree(geocentric_m(*places.T)).nearest_others(20).index
        overlaps = []
        for angles in (np.radians(places), places):
            index = BallTree(angles, metric="haversine").query(angles, k=21)[1][:, 1:]
            overlaps.append(np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(truth, index, strict=True)]))
        assert overlaps[0] > 0.98
        assert overlaps[1] < 0.3

    @pytest.mark.parametrize("num_dimensions", [2, 3])
    def test_nearest_equal_brute_force(self, num_dimensions):
        generator = np.random.default_rng(1)
        points, queries = generator.uniform(0, 100, (2, 300, num_dimensions))
        points[::7], queries[5] = np.nan, np.nan
        tree = NeighbourTree(points)
        assert tree.num_unlocated == 43
        found = tree.nearest(queries, 8)
        expected = np.nan_to_num(cdist(queries, points), nan=np.inf)
        for row in range(300):
            if row == 5:
                assert (found.index[row] == -1).all()
                assert np.isinf(found.distance_m[row]).all()
            else:
                assert found.index[row].tolist() == np.argsort(expected[row])[:8].tolist()
        near = [row for row in range(300) if row != 5]
        np.testing.assert_allclose(found.distance_m[near], np.sort(expected[near], axis=1)[:, :8])

    def test_across_the_antimeridian_and_at_the_pole_neighbours_are_near(self):
        antimeridian = geocentric_m([0.0, 0.0, 0.0], [179.9999, -179.9999, 179.99])
        assert NeighbourTree(antimeridian).nearest_others(1).index.tolist() == [[1], [0], [0]]
        pole = geocentric_m([89.9999, 89.9999, 89.99], [0.0, 180.0, 0.0])
        assert NeighbourTree(pole).nearest_others(1).index.tolist() == [[1], [0], [0]]

    def test_points_at_one_place_are_each_others_neighbours_and_never_their_own(self):
        points = np.zeros((9, 3))
        found = NeighbourTree(points).nearest_others(3)
        assert (found.distance_m == 0).all()
        assert not (found.index == np.arange(9)[:, None]).any()
        assert all(len(set(row)) == 3 for row in found.index.tolist())
        assert NeighbourTree(points).num_within(0.0).tolist() == [8] * 9

    def test_fewer_points_than_asked_for_leave_gaps(self):
        points = np.array([[0.0, 0.0], [np.nan, 0.0], [3.0, 4.0]])
        found = NeighbourTree(points).nearest_others(3)
        assert found.index.tolist() == [[2, -1, -1], [-1, -1, -1], [0, -1, -1]]
        assert found.distance_m[0].tolist() == [5.0, np.inf, np.inf]
        nowhere = NeighbourTree(np.full((4, 3), np.nan))
        assert (nowhere.nearest_others(2).index == -1).all()
        assert nowhere.num_within(1e9).tolist() == [0] * 4
        assert list(nowhere.pairs_within(1e9)) == []
        with pytest.raises(ConfigError, match="k: 0"):
            nowhere.nearest(points, 0)

    @pytest.mark.parametrize("at_a_time", [1, 50, 10**6])
    def test_pairs_within_a_radius_equal_brute_force_however_they_are_parted(self, monkeypatch, at_a_time):
        monkeypatch.setattr(geography, "_PAIRS_AT_A_TIME", at_a_time)
        points = np.random.default_rng(2).uniform(0, 100, (120, 3))
        points[3] = np.nan
        points[10] = points[11]
        tree = NeighbourTree(points)
        parts = list(tree.pairs_within(20.0))
        is_near = cdist(points, points) <= 20.0
        np.fill_diagonal(is_near, val=False)
        rows, others = (np.concatenate(column) for column in zip(*parts, strict=True))
        expected_rows, expected_others = is_near.nonzero()
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_array_equal(others, expected_others)
        np.testing.assert_array_equal(tree.num_within(20.0), is_near.sum(axis=1))
        assert all(len(part[0]) <= at_a_time + is_near.sum(axis=1).max() for part in parts)
